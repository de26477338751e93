"What people use beside fastai: trackers, formats for deployment, the Hugging Face hub; all without a network"
import base64, json, subprocess, sys, textwrap
import numpy as np, pytest, torch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from mixfast.all import Segment, mix_dls, mix_learner
from conftest import images, same

def test_wandb_offline(make, tmp_path, monkeypatch):
    "fastai's own callback, and nothing leaves the machine"
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    plain = lambda v: [plain(o) for o in v] if isinstance(v, list) else v if isinstance(v, (int,float,str,bool,type(None))) else str(v)
    monkeypatch.setattr('fastai.callback.wandb._format_config_value', plain) # fastai's fails on a plain learner too: vars(1)
    monkeypatch.setenv('WANDB_SILENT', 'true')
    learn = make()
    with wandb.init(mode='offline', dir=tmp_path, project='mixfast') as run:
        learn.fit_mixtraining(2, 2, cbs=WandbCallback(log_preds=False, log_model=False))
        logged = dict(run.summary)
    h = learn.mix.history
    assert logged['epoch']==len(h) and np.isclose(logged['accuracy'], h.accuracy.iloc[-1])
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))

def test_mlflow_folder(make, tmp_path, monkeypatch):
    "Settings, and the history a row a step"
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    learn = make()
    learn.fit_mixtraining(2, 2)
    mlflow.set_tracking_uri((tmp_path/'runs').as_uri())
    with mlflow.start_run() as run:
        mlflow.log_params({k: learn.mix.settings[k] for k in ('e_ssl','e_sl','rho')})
        for i,row in learn.mix.history.drop(columns='phase').iterrows(): mlflow.log_metrics(row.dropna().astype(float).to_dict(), step=i)
    saved = mlflow.get_run(run.info.run_id).data
    assert saved.params['rho']=='0.5' and np.isclose(saved.metrics['accuracy'], learn.mix.history.accuracy.iloc[-1])

def outputs(learn):
    "A batch, the model in evaluation mode, what it says"
    x = learn.dls.valid.one_batch()[0][:3]
    m = learn.model.eval()
    with torch.no_grad(): return x, m, m(x)

def segmenter(make):
    x,y = images(16, 32, 3)
    masks = (x[...,0]>128).astype(np.uint8)
    learn = mix_learner(mix_dls((x,masks), (x[:4],masks[:4]), vocab=['dark','light'], bs=4), 'test_resnet', task=Segment())
    learn.fit_mixtraining(1, 1)
    return learn

def classifier(make):
    learn = make()
    learn.fit_mixtraining(1, 1)
    return learn

@pytest.mark.parametrize('kind', [classifier, segmenter])
def test_torch_export(make, kind):
    x,m,y = outputs(kind(make))
    assert torch.allclose(torch.export.export(m, (x,)).module()(x), y, atol=1e-5)

@pytest.mark.parametrize('kind', [classifier, segmenter])
def test_onnx(make, tmp_path, kind):
    "For any number of images"
    ort = pytest.importorskip('onnxruntime')
    x,m,y = outputs(kind(make))
    torch.onnx.export(m, (x,), tmp_path/'model.onnx', dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},), verbose=False)
    sess = ort.InferenceSession(tmp_path/'model.onnx')
    name = sess.get_inputs()[0].name
    for n in (3,1): assert np.allclose(sess.run(None, {name: x[:n].numpy()})[0], y[:n].numpy(), atol=1e-4)

class Hub(BaseHTTPRequestHandler):
    "As much of the Hugging Face hub as an upload and a download want: files of one repository, in memory"
    files = {}
    def log_message(self, *args): pass
    def answer(self, body=b'', code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k,v in (dict(Content_Length=len(body)) | headers).items(): self.send_header(k.replace('_','-'), str(v))
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def do_POST(self):
        n = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(n) if n else b''.join(iter(self.chunk, b''))
        if self.path=='/api/repos/create': return self.answer(dict(url=f'{hub_url(self)}/me/digits', name='me/digits'))
        if '/preupload/' in self.path:
            names = [o['path'] for o in json.loads(body)['files']]
            return self.answer(dict(files=[dict(path=o, uploadMode='regular', shouldIgnore=False, oid=None) for o in names]))
        if '/commit/' in self.path:
            for line in map(json.loads, body.splitlines()):
                if line['key']=='file': self.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            return self.answer(dict(success=True, commitUrl=f'{hub_url(self)}/me/digits/commit/{SHA}', commitOid=SHA, commitMessage='x'))
        self.answer(dict(), 200)
    def chunk(self):
        n = int(self.rfile.readline(), 16)
        data = self.rfile.read(n)
        self.rfile.readline()
        return data
    def do_GET(self):
        if '/resolve/' in self.path:
            data = self.files.get(self.path.split('/resolve/')[1].split('/', 1)[1].split('?')[0])
            if data is None: return self.answer(dict(error='Entry not found'), 404, X_Error_Code='EntryNotFound', X_Repo_Commit=SHA)
            return self.answer(data, ETag=f'"{hash(data) & 0xffffffff:x}"', X_Repo_Commit=SHA)
        if self.path.startswith('/api/whoami'): return self.answer(dict(name='me', type='user', auth=dict(accessToken=dict(role='write'))))
        self.answer(dict(id='me/digits', sha=SHA, siblings=[dict(rfilename=o) for o in self.files], private=False, tags=[]))
    do_HEAD = do_GET
SHA = 'a'*40
def hub_url(h): return 'http://%s:%d' % h.server.server_address

def test_hub(make, tmp_path, monkeypatch):
    "Uploaded by huggingface_hub, loaded by timm, from a server that stands in for the hub"
    learn = make(global_pool='avg', class_token=False)
    learn.fit_mixtraining(1, 1)
    folder = learn.mix.save_backbone(tmp_path/'digits')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    script = textwrap.dedent('''
        import sys, torch, timm
        from huggingface_hub import HfApi
        api = HfApi(token='hf_x')
        api.create_repo('me/digits', exist_ok=True)
        api.upload_folder(repo_id='me/digits', folder_path=sys.argv[1])
        m = timm.create_model('hf-hub:me/digits', pretrained=True)
        torch.save(m.state_dict(), sys.argv[2])
    ''')
    env = dict(HF_ENDPOINT='http://127.0.0.1:%d' % server.server_port, HF_HOME=str(tmp_path/'home'), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
    for k,v in env.items(): monkeypatch.setenv(k, v)
    try: done = subprocess.run([sys.executable, '-c', script, folder, tmp_path/'w.pt'], capture_output=True, text=True, timeout=120)
    finally: server.shutdown()
    assert done.returncode==0, done.stderr
    assert set(Hub.files)>={'README.md','config.json','model.safetensors'}
    assert same(torch.load(tmp_path/'w.pt', weights_only=True), learn.model.state_dict())
