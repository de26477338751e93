"""Algorithm 1 of MixTraining in plain PyTorch, written from the paper: the library must give the same weights.

Nothing here comes from mixfast or fastai. timm gives the backbone and the transformer blocks of the decoder.
"""
import math
import torch, torch.nn.functional as F
from torch import nn
from timm.models.vision_transformer import Block

class RefMAE(nn.Module):
    "Decoder on features, 75 % of which are masked; the loss counts the masked patches"
    def __init__(self, dim, heads, grid, patch, chans, pos):
        super().__init__()
        self.grid,self.patch = grid,patch
        self.embed,self.mask_token = nn.Linear(dim, dim),nn.Parameter(torch.zeros(dim))
        self.blocks = nn.Sequential(Block(dim, heads, qkv_bias=True), Block(dim, heads, qkv_bias=True))
        self.norm,self.pred = nn.LayerNorm(dim),nn.Linear(dim, patch*patch*chans)
        self.register_buffer('pos', pos)

    def loss(self, feats, x, mask):
        z = self.embed(feats)
        cls,z = z[:,:1],z[:,1:]
        for i in range(len(z)): z = z.clone(); z[i,mask[i]] = self.mask_token
        z = self.norm(self.blocks(torch.cat([cls, z+self.pos], dim=1)))
        out,total,n = self.pred(z)[:,1:],0.,0
        p = self.patch
        for i in range(len(x)):
            for k in torch.nonzero(mask[i]).flatten().tolist():
                r,c = divmod(k, self.grid)
                target = x[i,:,r*p:(r+1)*p,c*p:(c+1)*p].permute(1,2,0).flatten()
                total,n = total+((out[i,k]-target)**2).sum(),n+target.numel()
        return total/n

class RefAE(nn.Module):
    "Two transposed convolutions from the last map; the loss counts the whole image"
    def __init__(self, dim, s1, s2, chans):
        super().__init__()
        self.c1,self.c2 = nn.ConvTranspose2d(dim, 64, s1, s1),nn.ConvTranspose2d(64, chans, s2, s2)
    def loss(self, feats, x, mask): return ((self.c2(torch.relu(self.c1(feats)))-x)**2).mean()

def learning_rate(step, steps, base, warm):
    w = round(warm*steps)
    return base*(step+1)/w if step<w else base*(1+math.cos(math.pi*(step-w)/(steps-w)))/2

def train(backbone, head, steps, n_ssl, mean, std, ssl, sl, alpha, lam, keep):
    """Train by Algorithm 1 on `steps`, a list of (phase, images uint8 or a pair of them, labels, mask), the first `n_ssl` of them SSL.

    `ssl` and `sl`: dicts of lr (for this batch), warm, betas, wd. `keep`: names of the parameters that are not decayed though matrices.
    """
    named = [*backbone.named_parameters(), *head.named_parameters()]
    decay = [p for n,p in named if p.ndim>1 and n not in keep]
    rest  = [p for n,p in named if not (p.ndim>1 and n not in keep)]
    opt = None
    backbone.train(); head.train()
    floats = lambda im: (im.float()-mean*255)/(std*255)
    for k,(phase,im,y,mask) in enumerate(steps):
        h,i,n = (ssl,k,n_ssl) if phase=='ssl' else (sl,k-n_ssl,len(steps)-n_ssl)
        if i==0: opt = torch.optim.AdamW([dict(params=decay, weight_decay=h['wd']), dict(params=rest, weight_decay=0.)], betas=h['betas'], fused=True)
        for g in opt.param_groups: g['lr'] = learning_rate(i, n, h['lr'], h['warm'])
        x = lam*floats(im[0])+(1-lam)*floats(im[1]) if isinstance(im, tuple) else floats(im)
        feats = backbone.forward_features(x)
        loss = 0.
        if phase!='sl':  loss = loss+(alpha if phase=='mix' else 1)*head.loss(feats, x, mask)
        if phase!='ssl': loss = loss+((1-alpha) if phase=='mix' else 1)*F.cross_entropy(backbone.forward_head(feats), y)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
