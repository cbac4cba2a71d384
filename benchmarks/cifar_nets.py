"""The networks of the reference tables for CIFAR-100: ResNets and wide ResNets for 32 pixels, as their papers define them.

`make('resnet32x4')` has the stages `layer1` to `layer3` and the vectors `pool`; "x4" is four times the width after the first convolution's double.
"""
import re
import torch.nn.functional as F
from torch import nn

def conv(ni, no, size=3, stride=1): return nn.Conv2d(ni, no, size, stride, size//2, bias=False)

class Block(nn.Module):
    "Two convolutions and a shortcut (He 2015); `act` comes last"
    def __init__(self, ni, no, stride):
        super().__init__()
        self.conv1,self.bn1,self.relu = conv(ni, no, stride=stride),nn.BatchNorm2d(no),nn.ReLU()
        self.conv2,self.bn2,self.act = conv(no, no),nn.BatchNorm2d(no),nn.ReLU()
        same = ni == no and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(ni, no, 1, stride), nn.BatchNorm2d(no))

    def forward(self, x): return self.act(self.shortcut(x) + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

class WideBlock(nn.Module):
    "Normalisation and activation come before each convolution (Zagoruyko & Komodakis 2016)"
    def __init__(self, ni, no, stride):
        super().__init__()
        self.bn1,self.conv1,self.bn2,self.conv2 = nn.BatchNorm2d(ni),conv(ni, no, stride=stride),nn.BatchNorm2d(no),conv(no, no)
        self.shortcut = nn.Identity() if ni == no else conv(ni, no, 1, stride)
        self.same = ni == no

    def forward(self, x):
        y = F.relu(self.bn1(x))
        return self.shortcut(x if self.same else y) + self.conv2(F.relu(self.bn2(self.conv1(y))))

class Net(nn.Module):
    def __init__(self, block, n, stem, widths, n_classes=100):
        super().__init__()
        wide = block is WideBlock
        self.conv1,self.bn1 = conv(3, stem),nn.Identity() if wide else nn.BatchNorm2d(stem)
        for i,(ni,no) in enumerate(zip((stem,*widths), widths)):
            stage = [block(ni if j == 0 else no, no, 2 if i and j == 0 else 1) for j in range(n)]
            setattr(self, f'layer{i+1}', nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(widths[-1]) if wide else nn.Identity()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(widths[-1], n_classes)
        self.wide = wide
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x if self.wide else F.relu(x))))
        return self.fc(self.pool(F.relu(self.bn(x)) if self.wide else x))

def make(
    name:str, # Such as 'resnet20', 'resnet8x4' or 'wrn40-2'
    n_classes:int=100,
) -> nn.Module:
    kind,depth,width = re.fullmatch(r'(resnet|wrn)(\d+)(?:[x-](\d+))?', name).groups()
    n,rest = divmod(int(depth) - (4 if kind == 'wrn' else 2), 6)
    if rest: raise ValueError(f'No {name}: {depth} layers do not make three stages of equal length')
    if kind == 'wrn': return Net(WideBlock, n, 16, [16*int(width)*2**i for i in range(3)], n_classes)
    k = int(width or 1)
    return Net(Block, n, 16 if k == 1 else 8*k, [16*k*2**i for i in range(3)], n_classes)
