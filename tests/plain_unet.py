"""EDM's networks written a second time, from their description: functions on a dictionary of weights."""
import math

import torch
import torch.nn.functional as F

NCSN_FILTER = torch.outer(torch.tensor([1.,3.,3.,1.]), torch.tensor([1.,3.,3.,1.]))/64


def silu(x): return x*torch.sigmoid(x)


def depthwise(x, f, stride, padding=0):
    return torch.cat([F.conv2d(x[:,i:i+1], f[None,None], stride=stride, padding=padding) for i in range(x.shape[1])], 1)


def down(x, smooth):
    if smooth: return depthwise(x, NCSN_FILTER, 2, 1)
    return (x[:,:,::2,::2] + x[:,:,1::2,::2] + x[:,:,::2,1::2] + x[:,:,1::2,1::2])/4


def double(x, axis):
    "out[2i] = (3x[i]+x[i-1])/4 and out[2i+1] = (3x[i]+x[i+1])/4 along one axis, with zeros outside."
    zero = torch.zeros_like(x.narrow(axis, 0, 1))
    before = torch.cat([zero, x.narrow(axis, 0, x.shape[axis]-1)], axis)
    after = torch.cat([x.narrow(axis, 1, x.shape[axis]-1), zero], axis)
    return torch.stack([(3*x+before)/4, (3*x+after)/4], axis+1).flatten(axis, axis+1)


def up(x, smooth):
    return double(double(x, 2), 3) if smooth else x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def conv(w, k, x, way=''):
    smooth = k+'.resample_filter' in w and w[k+'.resample_filter'].shape[-1] == 4
    if way: x = (down if way == 'down' else up)(x, smooth)
    return F.conv2d(x, w[k+'.weight'], w[k+'.bias'], padding=w[k+'.weight'].shape[-1]//2) if k+'.weight' in w else x


def fused_down(w, k, x):
    h = F.conv2d(x, w[k+'.weight'], padding=2)
    return depthwise(h, NCSN_FILTER, 2) + w[k+'.bias'][None,:,None,None]


def norm(w, k, x, eps):
    return F.group_norm(x, min(32, x.shape[1]//4), w[k+'.weight'], w[k+'.bias'], eps=eps)


def attention(a, heads):
    n, c, h, wd = a.shape
    a, width = a.flatten(2), c//3//heads
    out = []
    for head in range(heads):
        q, k, v = (torch.stack([a[:,3*(head*width+i)+j] for i in range(width)], 1) for j in range(3))
        s = torch.einsum('ncq,nck->nqk', q, k)/math.sqrt(width)
        s = (s - s.amax(2, keepdim=True)).exp()
        out.append(torch.einsum('nqk,nck->ncq', s/s.sum(2, keepdim=True), v))
    return torch.cat(out, 1).reshape(n, c//3, h, wd)


def block(w, k, x, e, adm):
    way = 'down' if k.endswith('_down') else 'up' if k.endswith('_up') else ''
    eps, half = (1e-5, 1) if adm else (1e-6, math.sqrt(2))
    h = conv(w, k+'.conv0', silu(norm(w, k+'.norm0', x, eps)), way)
    a = F.linear(e, w[k+'.affine.weight'], w[k+'.affine.bias'])[:,:,None,None]
    if adm: h = norm(w, k+'.norm1', h, eps)*(1+a[:,:h.shape[1]]) + a[:,h.shape[1]:]
    else: h = norm(w, k+'.norm1', h + a, eps)
    h = conv(w, k+'.conv1', silu(h))
    if any(name.startswith(k+'.skip.') for name in w): x = conv(w, k+'.skip', x, way)
    h = (h + x)/half
    if k+'.qkv.weight' not in w: return h
    a = attention(conv(w, k+'.qkv', norm(w, k+'.norm2', h, eps)), h.shape[1]//64 if adm else 1)
    return (conv(w, k+'.proj', a) + h)/half


def embedding(w, noise, labels, aug, adm):
    width = w['map_layer0.weight'].shape[1]
    if 'map_noise.freqs' in w: angle = noise[:,None]*(2*math.pi*w['map_noise.freqs'])
    else: angle = noise[:,None]*torch.tensor([(1/10000)**(k/(width//2-(0 if adm else 1))) for k in range(width//2)])
    e = torch.cat([torch.cos(angle), torch.sin(angle)] if adm else [torch.sin(angle), torch.cos(angle)], 1)
    if not adm and 'map_label.weight' in w: e = e + F.linear(labels*labels.shape[1]**.5, w['map_label.weight'],
                                                             w['map_label.bias'])
    if aug is not None: e = e + F.linear(aug, w['map_augment.weight'])
    e = F.linear(silu(F.linear(e, w['map_layer0.weight'], w['map_layer0.bias'])), w['map_layer1.weight'],
                 w['map_layer1.bias'])
    if adm and 'map_label.weight' in w: e = e + F.linear(labels, w['map_label.weight'])
    return silu(e)


def unet(w, x, noise, labels, aug):
    w = {k.removeprefix('model.'):v for k,v in w.items()}
    adm = 'out_conv.weight' in w
    e = embedding(w, noise, labels, aug, adm)
    kept, image = [], x
    for k in dict.fromkeys('.'.join(k.split('.')[:2]) for k in w if k.startswith(('enc.','dec.'))):
        if k.endswith('aux_norm'): x = silu(norm(w, k, x, 1e-6))
        elif k.endswith('aux_conv'): return conv(w, k, x)
        elif k.endswith('aux_residual'):
            x = image = (x + fused_down(w, k, image))/math.sqrt(2)
            kept[-1] = x
        elif k.endswith('_conv'): x = conv(w, k, x)
        else:
            if w[k+'.norm0.weight'].shape[0] != x.shape[1]: x = torch.cat([x, kept.pop()], 1)
            x = block(w, k, x, e, adm)
        if k.startswith('enc.') and not k.endswith('aux_residual'): kept.append(x)
    return conv(w, 'out_conv', silu(norm(w, 'out_norm', x, 1e-5)))


def edm(w, x, s, labels, aug):
    s, d = s.reshape(-1,1,1,1), 0.5
    f = unet(w, x/torch.sqrt(s**2+d**2), torch.log(s.flatten())/4, labels, aug)
    return d**2/(s**2+d**2)*x + s*d/torch.sqrt(s**2+d**2)*f


def vp(w, x, s, labels, aug):
    s = s.reshape(-1,1,1,1)
    time = (torch.sqrt(0.1**2 + 2*19.9*torch.log(1+s**2)) - 0.1)/19.9
    return x - s*unet(w, x/torch.sqrt(1+s**2), 999*time.flatten(), labels, aug)


def ve(w, x, s, labels, aug):
    return x + s.reshape(-1,1,1,1)*unet(w, x, torch.log(s.flatten()/2), labels, aug)


def iddpm(w, x, s, labels, aug):
    table = w['u'].tolist()
    nearest = [min(range(1001), key=lambda j: abs(table[j]-v)) for v in s.flatten().tolist()]
    s = s.reshape(-1,1,1,1)
    f = unet({k:v for k,v in w.items() if k != 'u'}, x/torch.sqrt(1+s**2), torch.tensor([999.-j for j in nearest]),
             labels, aug)
    return x - s*f[:,:x.shape[1]]


PLAIN = {'EDMPrecond':edm, 'VPPrecond':vp, 'VEPrecond':ve, 'iDDPMPrecond':iddpm}


def path(denoise, z, levels):
    "Heun's steps through `levels` and on to 0, in plain numbers."
    x, t, visited = z.double()*levels[0], [*levels, 0.], []
    def slope(v, s): return (v - denoise(v.float(), torch.tensor([s])).double())/s
    for a,b in zip(t, t[1:]):
        first = slope(x, a)
        x = x + (b-a)*first if b == 0 else x + (b-a)*(first + slope(x+(b-a)*first, b))/2
        visited.append(x)
    return visited
