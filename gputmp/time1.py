import torch, sys, itertools, time
import fused_margins
from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import kept, gpu, registry
import fused_margins.ops.triton_gradients as G
import fused_margins.ops.contrast.kernel_triton as K
from torch.nn import functional as F
def med(f,n=20,w=5):
    for _ in range(w): f()
    torch.cuda.synchronize(); ts=[]
    for _ in range(n):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return sorted(ts)[n//2]
def data(B,D,C,dt):
    g=torch.Generator("cuda").manual_seed(0)
    x=torch.randn(B,D,device="cuda",generator=g).to(dt).requires_grad_(); w=torch.randn(C,D,device="cuda",generator=g).to(dt).requires_grad_()
    return x,w,torch.randint(C,(B,),device="cuda",generator=g)
def ours(x,w,t,backend="triton"):
    def f():
        l=margin_softmax_loss(x,w,t,scale=30.,margin=0.35,backend=backend); torch.autograd.grad(l,(x,w))
    return f
def eag(x,w,t):
    def loss(x,w,t):
        z=F.linear(30*F.normalize(x),F.normalize(w)); z=z.scatter_add(1,t[:,None],z.new_full((1,1),-30*.35).expand(len(t),1)); return F.cross_entropy(z,t)
    def f(): torch.autograd.grad(loss(x,w,t),(x,w))
    c=torch.compile(loss)
    def h(): torch.autograd.grad(c(x,w,t),(x,w))
    return f,h
print(torch.cuda.get_device_name(), torch.__version__)
from torch.profiler import profile, ProfilerActivity
def kernels(f):
    f(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(3): f()
        torch.cuda.synchronize()
    d={}
    for e in p.key_averages():
        d[e.key[:34]]=(e.device_time_total/3, e.count//3)
    for k,(v,c) in sorted(d.items(),key=lambda t:-t[1][0])[:9]: print("   %9.1f us x%d %s"%(v,c,k))
B,D,C=1024,512,100000
x,w,t=data(B,D,C,torch.bfloat16)
e,c=eag(x,w,t)
print("eager %.3f compile %.3f"%(med(e),med(c)))
a=torch.randn(B,D,device="cuda",dtype=torch.bfloat16); z=torch.empty(B,C,device="cuda",dtype=torch.bfloat16)
wd=w.detach()
print("cublas z %.3f dy %.3f dx %.3f"%(med(lambda:torch.mm(a,wd.T,out=z)),med(lambda:z.T@a),med(lambda:z@wd)))

def cpu(f):
    f(); torch.cuda.synchronize(); t=time.perf_counter(); f(); u=time.perf_counter()-t; torch.cuda.synchronize(); return u*1e3
bf=torch.bfloat16
f=ours(x,w,t); print("total %.3f cpu %.3f"%(med(f),cpu(f))); kernels(f)
base={n:getattr(G,n)[bf] for n in("SIMILARITY_TILES","WEIGHT_TILES","PRODUCT_TILES")}
for name,T in [("SIMILARITY_TILES",(128,64,4,4)),("SIMILARITY_TILES",(128,32,4,4)),("WEIGHT_TILES",(64,64,4,3)),("WEIGHT_TILES",(64,64,8,3)),("WEIGHT_TILES",(128,64,8,4)),("WEIGHT_TILES",(128,32,8,4)),
   ("PRODUCT_TILES",(128,64,8,4)),("PRODUCT_TILES",(128,64,4,3)),("PRODUCT_TILES",(128,128,8,2)),("PRODUCT_TILES",(64,64,4,4))]:
    getattr(G,name)[bf]=G.Tiles(*T)
    try:
        f=ours(x,w,t); print(name,T,"total %.3f"%med(f)); kernels(f)
    except Exception as ex: print(name,T,type(ex).__name__,str(ex)[:100])
    getattr(G,name)[bf]=base[name]
for bd,T in [(256,(128,64,8,3)),(256,(128,64,8,4))]:
    G.BD[bf]=bd; G.PRODUCT_TILES[bf]=G.Tiles(*T)
    f=ours(x,w,t); print("prod",bd,T,"total %.3f"%med(f)); kernels(f)
G.BD[bf]=128; G.PRODUCT_TILES[bf]=base["PRODUCT_TILES"]
for mb in (24,32,64,96,256):
    G.CHUNK_BYTES=mb<<20; f=ours(x,w,t); print("chunk",mb,"%.3f cpu %.3f"%(med(f),cpu(f)))
G.CHUNK_BYTES=48<<20
for (B,D,C) in ((256,512,64),(256,1600,200),(1024,512,10000)):
    x,w,t=data(B,D,C,bf); e,c=eag(x,w,t); f=ours(x,w,t); print(B,D,C,"eager %.3f compile %.3f ours %.3f cpu %.3f"%(med(e),med(c),med(f),cpu(f)))
x,w,t=data(1024,512,20000,torch.float32)
e,c=eag(x,w,t); print("fp32 20000 eager %.3f compile %.3f"%(med(e),med(c)))
f=ours(x,w,t); print("ours %.3f"%med(f)); kernels(f)
from fused_margins.ops import cases
from fused_margins.functional import mine_positives,mine_negatives,cluster_distances
x=torch.randn(32768,512,device="cuda",dtype=bf); l=torch.arange(32768,device="cuda")//4
f=lambda:mine_negatives(x,l,backend="triton"); print("hardest negative %.3f"%med(f,5,2)); kernels(f)
def hn():
    n=F.normalize(x); z=n@n.T; z.masked_fill_(l[:,None]==l,-9); return z.max(1)
print("eager %.3f"%med(hn,5,2))
x=torch.randn(8192,512,device="cuda",dtype=bf); l=torch.arange(8192,device="cuda")//4
f=lambda:mine_positives(x,l,backend="triton"); print("positives 8192 %.3f cpu %.3f"%(med(f,5,2),cpu(f))); kernels(f)
