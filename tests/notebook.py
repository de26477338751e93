"A notebook in a process of its own, which has imported what others wrote and nothing of mixfast"
import multiprocessing, os
from multiprocessing import forkserver
from joblib.externals.loky import get_reusable_executor

HEAVY = ['torch','torchvision','timm','pandas','matplotlib.pyplot','sklearn.linear_model','nbdev.test'] # five seconds of each notebook

def start(env):
    "Start the server that such processes are forked from, with variables `env`"
    old,ctx = dict(os.environ),multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(HEAVY)
    os.environ |= env
    try: forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= old
    return ctx

def work(nb, log):
    "What the process does"
    f = os.open(log, os.O_WRONLY|os.O_CREAT)
    for fd in (1,2): os.dup2(f, fd)
    from nbdev.test import nbdev_test
    multiprocessing.set_start_method(None, force=True) # as where nobody has asked for one
    try: nbdev_test(str(nb))
    finally: get_reusable_executor().shutdown(kill_workers=True) # else such a process waits until joblib's are idle for five minutes

def run(ctx, nb, log):
    "Run the notebook; False if it fails"
    p = ctx.Process(target=work, args=(nb,log))
    p.start()
    p.join()
    return p.exitcode==0
