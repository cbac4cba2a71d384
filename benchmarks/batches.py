"Batches that are cut out of tensors: what the experiments on small photographs share"
import torch
from fastai.data.load import DataLoader

def windows(x, size):
    "A random square of each image (N, C, H, H), half of them mirrored; bytes stay bytes"
    n,device = len(x),x.device
    at = torch.randint(x.shape[-1]-size+1, (2,n,1), device=device) + torch.arange(size, device=device)
    cols = torch.where(torch.rand(n, 1, device=device) < .5, at[1], at[1].flip(1))
    return x.permute(0, 2, 3, 1)[torch.arange(n, device=device)[:,None,None], at[0][:,:,None], cols[:,None,:]].permute(0, 3, 1, 2)

def loader(x, y, bs, change, shuffle=False, **kwargs):
    "Batches of `change(x[i])` and `y[i]`, on the device of `x`"
    def take(idxs):
        idxs = torch.tensor(idxs, device=x.device)
        return x[idxs],y[idxs]
    def transform(b): return change(b[0]),b[1]
    return DataLoader(range(len(x)), bs=bs, shuffle=shuffle, create_batch=take, after_batch=transform, device=x.device, **kwargs)
