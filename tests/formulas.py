"""The formulas of the papers in NumPy and plain loops, to test the losses against.

`@formula_of('SoftTarget')` registers a formula: a function of the tensors as NumPy arrays, and of options of the loss with the same names.
"""
import inspect
import numpy as np
import torch
from scipy.special import rel_entr

formulas = {}     # name of a loss -> its formula

def formula_of(name):
    def register(f):
        formulas[name] = f
        return f
    return register

def expected(loss, *arrays):
    "What `loss` should return, by its formula and its options; `arrays` are the student's, the teacher's and the labels, if it needs them"
    formula = formulas[type(loss).__name__]
    takes = inspect.signature(formula).parameters
    options = {k:getattr(loss, k) for k in inspect.signature(type(loss)).parameters if k in takes}
    if 'built' in takes: options['built'] = {k:v.detach().double().numpy() for k,v in loss.state_dict().items()}
    return formula(*arrays, **options)

# B batch, C classes or channels, s student, t teacher, T temperature

def softmax(x, T=1):
    e = np.exp((np.asarray(x)-np.max(x))/T)
    return e/e.sum()

def kl(p, q): return rel_entr(p, q).sum()

def without(x, c): return np.array([v for i,v in enumerate(x) if i != c])

# --- on predictions ---

def zscore(x): return np.array([(r-r.mean())/(r.std(ddof=1)+1e-7) for r in x])

@formula_of('SoftTarget')
def soft_target(s, t, T, standardize=False):
    if standardize: s,t = zscore(s),zscore(t)
    return np.mean([T**2 * kl(softmax(b, T), softmax(a, T)) for a,b in zip(s, t)])

@formula_of('Logits')
def logits(s, t): return np.mean([(a-b)**2 for a,b in zip(s.ravel(), t.ravel())])

@formula_of('HardTarget')
def hard_target(s, t): return np.mean([-np.log(softmax(a)[b.argmax()]) for a,b in zip(s, t)])

def decoupled_item(a, b, c, T, alpha, beta):
    p,q = softmax(b, T)[c],softmax(a, T)[c]
    rest_p,rest_q = without(softmax(b, T), c).sum(),without(softmax(a, T), c).sum()     # 1-p loses its digits near p = 1
    return T**2 * (alpha*kl([p,rest_p], [q,rest_q]) + beta*kl(softmax(without(b, c), T), softmax(without(a, c), T)))

@formula_of('DecoupledKD')
def decoupled_kd(s, t, y, T, alpha, beta, standardize=False):
    if standardize: s,t = zscore(s),zscore(t)
    return np.mean([decoupled_item(a, b, c, T, alpha, beta) for a,b,c in zip(s, t, y)])

def normalized_item(a, b, c, T, gamma):
    return -softmax(b)[c]*np.log(softmax(a)[c]) - gamma * T**2 * (softmax(without(b, c), T)*np.log(softmax(without(a, c), T))).sum()

@formula_of('NormalizedKD')
def normalized_kd(s, t, y, T, gamma): return np.mean([normalized_item(a, b, c, T, gamma) for a,b,c in zip(s, t, y)])

def of_probabilities(item_loss, s, t, y, *args):
    "The mean over labels: what a loss of a single item is under probabilities `y` of its labels"
    return np.mean([sum(w*item_loss(a, b, c, *args) for c,w in enumerate(p)) for a,b,p in zip(s, t, y)])

def pearson(a, b):
    a,b = a-a.mean(),b-b.mean()
    return (a*b).sum()/np.sqrt((a*a).sum()*(b*b).sum())

@formula_of('DIST')
def dist(s, t, T, beta, gamma):
    p,q = (np.array([softmax(r, T) for r in x]) for x in (s,t))
    rows,columns = ([1-pearson(a, b) for a,b in zip(*o)] for o in ((p,q), (p.T,q.T)))
    return T**2 * (beta*np.mean(rows) + gamma*np.mean(columns))

@formula_of('MultiLabelSoftTarget')
def multi_label(s, t, T):
    "Summed over the labels, averaged over the batch"
    def yes_no(v): return softmax([v,0.], T)
    return T**2 * np.mean([sum(kl(yes_no(b), yes_no(a)) for a,b in zip(*o)) for o in zip(s, t)])

@formula_of('TeacherBounded')
def teacher_bounded(s, t, y, margin):
    errors = [(((a-c)**2).sum(),((b-c)**2).sum()) for a,b,c in zip(s, t, y)]
    return np.mean([e_s if e_s+margin > e_t else 0. for e_s,e_t in errors])

@formula_of('MultiLevel')
def multi_level(s, t, temperatures, batch, classes, standardize=False):
    def gram(x): return np.array([[(a*b).sum() for b in x] for a in x])
    def apart(p, q): return ((gram(p)-gram(q))**2).sum()/len(p)
    def at(T):
        p,q = (np.array([softmax(r, T) for r in x]) for x in (t,s))
        return batch*apart(p, q) + classes*apart(p.T, q.T)
    return sum(soft_target(s, t, T, standardize) + at(T) for T in temperatures)

# --- on features: maps (B, C, H, W), sequences (B, N, C), vectors (B, C) ---

def pool(fm, h, w):
    "Adaptive average pooling"
    H,W = fm.shape[2:]
    def cells(n, m): return [slice(i*n//m, -(-(i+1)*n//m)) for i in range(m)]
    return np.array([[[[c[r,k].mean() for k in cells(W, w)] for r in cells(H, h)] for c in item] for item in fm])

def same_size(s, t):
    if s.ndim != 4: return s,t
    h,w = (min(a, b) for a,b in zip(s.shape[2:], t.shape[2:]))
    return pool(s, h, w),pool(t, h, w)

def positions(x):
    "(B, positions, C)"
    if x.ndim == 2: return x[:,None]
    return x if x.ndim == 3 else np.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2)

@formula_of('Attention')
def attention(s, t, p):
    "The larger features are pooled, then squared"
    a,b = ((np.abs(x)**p).mean(1) for x in same_size(s, t))
    def unit(m): return m.ravel()/max(np.sqrt((m**2).sum()), 1e-12)
    return np.mean([(unit(m)-unit(n))**2 for m,n in zip(a, b)])

@formula_of('FitNet')
def fitnet(s, t): return logits(*same_size(s, t))     # without a projector

@formula_of('Cosine')
def cosine(s, t):
    s,t = map(positions, same_size(s, t))
    def cos(a, b): return a@b/np.sqrt((a@a)*(b@b)) if (a@a)*(b@b) > 0 else 0.
    return np.mean([1-cos(a, b) for i,j in zip(s, t) for a,b in zip(i, j)])

@formula_of('ActivationBoundaries')
def activation_boundaries(s, t, margin):
    m = margin
    def of(a, b): return (a+m)**2 if a > -m and b <= 0 else (a-m)**2 if a <= m and b > 0 else 0.
    s,t = same_size(s, t)
    return np.mean([of(a, b) for a,b in zip(s.ravel(), t.ravel())])

@formula_of('VID')
def vid(s, t, eps, built):
    "The mean is predicted by three layers with a ReLU between them, without biases"
    s,t = map(positions, same_size(s, t))
    w1,w2,w3 = (w.reshape(w.shape[:2]) for k,w in built.items() if k.endswith('weight'))
    mean = np.maximum(np.maximum(s@w1.T, 0)@w2.T, 0)@w3.T
    variance = np.log1p(np.exp(built['scale'])) + eps
    return np.mean([((mean[...,c]-t[...,c])**2/v + np.log(v))/2 for c,v in enumerate(variance)])

@formula_of('ChannelWise')
def channel_wise(s, t, T):
    s,t = map(positions, same_size(s, t))
    return T**2 * np.mean([kl(softmax(j[:,c], T), softmax(i[:,c], T)) for i,j in zip(s, t) for c in range(s.shape[2])])

@formula_of('NST')
def nst(s, t):
    s,t = map(positions, same_size(s, t))
    def units(x): return [c/np.sqrt((c**2).sum()) if c.any() else c for c in x.T]
    def k(xs, ys): return np.mean([(a@b)**2 for a in xs for b in ys])
    return np.mean([k(a, a) + k(b, b) - 2*k(a, b) for a,b in ((units(i), units(j)) for i,j in zip(s, t))])

def convolved(x, w, b):
    "The sum over a window of the weights' size, 0 beyond the edges"
    k = w.shape[2]//2
    x = np.pad(x, ((0,0),(0,0),(k,k),(k,k)))
    H,W = (n-2*k for n in x.shape[2:])
    return np.array([[[[(item[:,i:i+2*k+1,j:j+2*k+1]*o).sum() + c for j in range(W)] for i in range(H)] for o,c in zip(w, b)] for item in x])

@formula_of('MGD')
def mgd(s, t, mask, channels, built):
    "With the mask of the seed 0, see `built` in loss_cases.py"
    s,t = same_size(s, t)
    if 'align.weight' in built: s = convolved(s, built['align.weight'], built['align.bias'])
    drawn = torch.rand((*s.shape[:2],1,1) if channels else (len(s),1,*s.shape[2:]), generator=torch.Generator().manual_seed(0)).numpy()
    x = np.where(drawn < mask, 0, s)
    x = np.maximum(convolved(x, built['generate.0.weight'], built['generate.0.bias']), 0)
    return np.mean((convolved(x, built['generate.2.weight'], built['generate.2.bias'])-t)**2)

def normed(x, eps=1e-5):
    "Batch norm without weight and bias, as it starts"
    axes = tuple(i for i in range(x.ndim) if i != 1)
    return (x-x.mean(axes, keepdims=True))/np.sqrt(x.var(axes, keepdims=True)+eps)

def projected(x, w): return normed(np.einsum('oc,bchw->bohw', w[:,:,0,0], x))

@formula_of('OFD')
def ofd(s, t, built):
    def of(a, b, m): return (a-b)**2 if b > 0 else max(0, a-max(b, m))**2
    margin = [c[c<0].mean() if (c<0).any() else -3*c.std() for c in np.moveaxis(t, 1, 0)]
    s,t = same_size(s, t)
    s = projected(s, built['projector.0.weight'])
    return np.mean([of(a, b, m) for i,j in zip(s, t) for c,d,m in zip(i, j, margin) for a,b in zip(c.ravel(), d.ravel())])

def enlarged(x, h, w):
    "Each position takes the nearest one before it"
    H,W = x.shape[2:]
    return np.array([[[[c[i*H//h,j*W//w] for j in range(w)] for i in range(h)] for c in item] for item in x])

def hierarchical(s, t):
    sizes = [s.shape[2:], *[(n,n) for n in (4,2,1) if n < min(s.shape[2:])]]
    weights = [1/2**i for i in range(len(sizes))]
    return sum(w*logits(pool(s, *n), pool(t, *n)) for w,n in zip(weights, sizes))/sum(weights)

@formula_of('ReviewKD')
def review_kd(s, t, built):
    "Of two stages that are the same, see `on_a_pair` in loss_cases.py"
    def get(i, name): return built[f'fusions.{i}.{name}']
    def compare(i, x): return hierarchical(normed(convolved(x, get(i, 'leave.0.weight'), np.zeros(t.shape[1]))), t)
    deep = enlarged(projected(s, get(1, 'enter.0.weight')), *t.shape[2:])
    x = projected(s, get(0, 'enter.0.weight'))
    back = enlarged(deep, *x.shape[2:])
    scores = convolved(np.concatenate([x,back], 1), get(0, 'attend.0.weight'), get(0, 'attend.0.bias'))
    a,b = (1/(1+np.exp(-scores[:,[i]])) for i in (0,1))
    return compare(1, deep) + compare(0, enlarged(a*x + b*back, *t.shape[2:]))

# --- on relations within the batch ---

@formula_of('Similarity')
def similarity(s, t):
    def table(x):
        g = np.array([[(a*b).sum() for b in x] for a in x])
        return np.array([r/np.sqrt((r**2).sum()) if r.any() else r for r in g])
    return ((table(s)-table(t))**2).sum()/len(s)**2

def smooth_l1(d): return d**2/2 if abs(d) < 1 else abs(d)-0.5

def rkd_distance(s, t):
    def table(x):
        x = positions(x).mean(1)
        d = np.array([[np.sqrt(((a-b)**2).sum()) for b in x] for a in x])
        return d/d[d>0].mean()
    return np.mean([smooth_l1(d) for d in (table(s)-table(t)).ravel()])

def rkd_angle(s, t):
    def cos(x, i, j, k):
        a,b = x[i]-x[j],x[i]-x[k]
        return a@b/np.sqrt((a@a)*(b@b)) if i not in (j,k) else 0.
    s,t = (positions(x).mean(1) for x in (s,t))
    n = range(len(s))
    return np.mean([smooth_l1(cos(s, i, j, k)-cos(t, i, j, k)) for i in n for j in n for k in n])

@formula_of('RKD')
def rkd(s, t, distance, angle): return distance*rkd_distance(s, t) + angle*rkd_angle(s, t)

@formula_of('PKT')
def pkt(s, t, eps):
    def table(x):
        x = positions(x).mean(1)
        k = np.array([[(a@b/np.sqrt((a@a)*(b@b))+1)/2 for b in x] for a in x])
        return np.array([r/r.sum() for r in k])
    return np.mean([p*np.log((p+eps)/(q+eps)) for p,q in zip(table(t).ravel(), table(s).ravel())])

@formula_of('CRD')
def crd(s, t, negatives, tau, built):
    "With the negatives of the seed 0, for the items 0, 1, 2, ..., see loss_cases.py"
    def unit(v): return v/np.sqrt((v**2).sum())
    s,t = ([unit(built[f'embed_{who}.weight']@v + built[f'embed_{who}.bias']) for v in positions(x).mean(1)]
           for who,x in (('student',s), ('teacher',t)))
    def side(xs, memory):
        def h(a, j): return np.exp(a@memory[j]/tau)/z
        z = np.mean([sum(np.exp(a@m/tau) for m in memory) for a in xs])
        noise = negatives/len(memory)
        def item(i, a): return np.log(h(a, i)/(h(a, i)+noise)) + sum(counts[j]*np.log(noise/(h(a, j)+noise)) for j in range(len(memory)) if j != i)
        return -np.mean([item(i, a) for i,a in enumerate(xs)])
    n = len(built['memory_student'])
    drawn = torch.randint(n, (negatives,), generator=torch.Generator().manual_seed(0)).numpy()
    counts = [(drawn == j).sum() for j in range(n)]
    return side(s, built['memory_teacher']) + side(t, built['memory_student'])
