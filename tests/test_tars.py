"Images that stay in tars: the same fit as from memory, over a network too, in memory that does not grow with their number"
import io, os, subprocess, sys, tarfile, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pytest, torch
from PIL import Image

from conftest import Die, images, same, state
from mixfast.all import mix_dls, tar_images

pytest.importorskip('webdataset')

def encoded(x, kind='png'):
    f = io.BytesIO()
    Image.fromarray(x.squeeze()).save(f, kind)
    return f.getvalue()

def write(path, bs, y=None, kind='png'):
    "A tar as webdataset has it"
    with tarfile.open(path, 'w') as f:
        for i,b in enumerate(bs):
            for ext,b in {kind: b, **({} if y is None else dict(cls=str(y[i]).encode()))}.items():
                t = tarfile.TarInfo(f'{i:07}.{ext}'); t.size = len(b)
                f.addfile(t, io.BytesIO(b))
    return str(path)

@pytest.fixture
def tars(tmp_path):
    "24 labelled images, 9 to validate on, 40 without labels"
    (x,y),(xv,yv),(u,_) = images(24),images(9, seed=1),images(40, seed=2)
    return [write(tmp_path/f'{n}.tar', map(encoded, x), y) for n,x,y in (('sl',x,y), ('valid',xv,yv), ('ssl',u,None))]

def loaders(tars, cache, stream, **kwargs):
    kw = dict(size=8, mode='L', cache=cache, stream=stream, bar=False)
    d,u = tar_images(*tars[:2], **kw),tar_images(tars[2], label=None, **kw)
    return mix_dls(d.train, d.valid, u, vocab=d.vocab, bs=8, seed=0, **kwargs)

@pytest.mark.parametrize('kw', [{}, dict(lam=0.5)])
def test_as_from_memory(make, tars, tmp_path, kw):
    "Joint batches and blends, and what is done with a learner afterwards"
    def fit(stream):
        learn = make(dls=loaders(tars, tmp_path/'cache', stream, **kw))
        with learn.no_bar(): learn.fit_mixtraining(2, 2, rho=0.5)
        return learn
    a,b = fit(False),fit(True)
    assert same(state(a.model), state(b.model))
    assert torch.equal(a.get_preds()[0], b.get_preds()[0])
    b.dls.show_batch(max_n=2)
    b.export(tmp_path/'export.pkl')
    assert os.path.getsize(tmp_path/'export.pkl')<2_000_000

def test_resume_within_a_pass(make, tars, tmp_path):
    def learner(): return make(dls=loaders(tars, tmp_path/'cache', True))
    fit = partial(dict, e_ssl=2, e_sl=2, rho=0.5, checkpoint=tmp_path/'fit')
    whole = learner()
    with whole.no_bar(): whole.fit_mixtraining(2, 2, 0.5)
    with pytest.raises(RuntimeError, match='died'), learner().no_bar() as died: died.fit_mixtraining(**fit(every=1), cbs=Die(8))
    again = learner()
    with again.no_bar(): again.fit_mixtraining(**fit(), resume=True)
    assert same(state(whole.model), state(again.model))

def test_damaged_image_names_itself(make, tars, tmp_path):
    b = [encoded(o) for o in images(24)[0]]
    b[7] = b[7][:len(b[7])//2]
    bad = write(tmp_path/'bad.tar', b, images(24)[1])
    with pytest.raises(RuntimeError, match=r'cannot read .*bad\.tar/0000007\.png'): tar_images(bad, size=8, mode='L', cache=tmp_path/'cache')
    data = tar_images(bad, size=8, mode='L', cache=tmp_path/'cache', stream=True, valid_pct=0.25) # none is read yet
    with pytest.raises(RuntimeError, match='0000007'): mix_dls(data.train, data.valid)

def test_compressed_or_no_tar(tmp_path):
    f = tmp_path/'x.tar.gz'
    with tarfile.open(f, 'w:gz'): pass
    with pytest.raises(ValueError, match='cannot be read as a tar'): tar_images(f, cache=tmp_path/'cache')
    with pytest.raises(FileNotFoundError, match='none.tar'): tar_images(tmp_path/'none.tar', cache=tmp_path/'cache')
    with pytest.raises(ValueError, match='mode'): tar_images(write(tmp_path/'one.tar', map(encoded, images(2)[0])), mode='CMYK', label=None, cache=tmp_path/'cache')

class Server(SimpleHTTPRequestHandler):
    "Files, by parts if it is asked to, unless it does not know how"
    ranges,asked = True,[]
    def log_message(self, *args): pass
    def do_GET(self):
        r = self.headers.get('Range')
        if not (r and self.ranges): return super().do_GET()
        b = open(self.translate_path(self.path), 'rb').read()
        lo,hi = r.removeprefix('bytes=').split('-')
        lo,hi = int(lo),min(int(hi or len(b)), len(b)-1)
        self.asked.append(hi-lo+1)
        self.send_response(206)
        self.send_header('Content-Range', f'bytes {lo}-{hi}/{len(b)}')
        self.send_header('Content-Length', str(hi-lo+1))
        self.send_header('Accept-Ranges', 'bytes')
        self.end_headers()
        self.wfile.write(b[lo:hi+1])

@pytest.fixture
def server(tmp_path):
    s = ThreadingHTTPServer(('127.0.0.1', 0), partial(Server, directory=str(tmp_path)))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown(); s.server_close()

def test_over_http(tars, tmp_path, server):
    pytest.importorskip('aiohttp')
    here,there = [tar_images(o, size=8, mode='L', label=None, cache=tmp_path/'cache', stream=True) for o in (tars[2], f'{server}/ssl.tar')]
    Server.asked.clear()
    assert torch.equal(here[[3,30,8]], there[[3,30,8]])
    assert len(Server.asked)==3 and max(Server.asked)<1000, 'what is asked for, and no more'

def test_a_server_without_ranges(tars, tmp_path, server, monkeypatch):
    pytest.importorskip('aiohttp')
    there = tar_images(f'{server}/ssl.tar', size=8, mode='L', label=None, cache=tmp_path/'cache', stream=True)
    monkeypatch.setattr(Server, 'ranges', False)
    with pytest.raises(RuntimeError, match='ranges'): there[[3]]

MEMORY = '''
import resource, sys
from mixfast.all import *
d = tar_images(sys.argv[1], size=64, stream=True, bar=False, cache=sys.argv[2])
dls = mix_dls(d.train, d.valid, vocab=d.vocab, bs=64, seed=0, device='cpu')
learn = mix_learner(dls, 'vit_tiny_patch16_224', patch_size=32, embed_dim=16, depth=1, num_heads=1)
with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(1, 1, rho=1)
print(len(d.train[0]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)
'''
def test_memory_does_not_grow(tmp_path):
    "Ten times as many images, 12 kB each once they are decoded"
    bs = [encoded(np.random.default_rng(k).integers(0, 255, (64,64,3), np.uint8), 'jpeg') for k in range(10)]
    def peak(n):
        y = np.arange(n)%10
        f = write(tmp_path/f'{n}.tar', (bs[k] for k in y), y, 'jpg')
        res = subprocess.run([sys.executable, '-c', MEMORY, f, str(tmp_path/'cache')], capture_output=True, text=True, check=True)
        n,mb = map(int, res.stdout.split()[-2:])
        return mb
    small,large = peak(600),peak(6_000)
    assert large-small<25, f"{small} MB, and {large} MB" # decoded they would be 66 MB more

def test_no_tar_and_two_places(tmp_path):
    with pytest.raises(ValueError, match='tars must be the path or address of a tar, or a list of them, got none'): tar_images([])
    with pytest.raises(ValueError, match='tars must be on one file system, got .*memory://two.tar'): tar_images([tmp_path/'one.tar', 'memory://two.tar'])
