"What is known of the data that a network was made for."
from types import SimpleNamespace
from fastdistill.data import describe_data

def test_data_described():
    from fastai.data.transforms import CategoryMap
    from fastai.vision.augment import RandomResizedCrop, Resize
    from fastdistill.data import describe_data
    def of(vocab=None, *tfms): return describe_data(SimpleNamespace(vocab=vocab, after_item=SimpleNamespace(fs=list(tfms))))
    assert of() == of(3) == of('ab') == {}
    classes = CategoryMap(['b','a'])
    assert of(classes) == dict(classes=['a','b']) and of((['the','of'], classes)) == dict(classes=['a','b'], tokens=['the','of'])
    assert of((classes,classes)) == {}     # two labels for an item: whose logits would be named?
    assert of([3,True,None]) == dict(classes=['3','True','None']) and of([]) == {}
    stream = SimpleNamespace(vocab=['xxpad','the'], loaders=[SimpleNamespace(make_chunks=None)])
    assert describe_data(stream) == dict(classes=['xxpad','the'], tokens=['xxpad','the'])
    odd = SimpleNamespace(size=lambda: 3)
    assert of(None, Resize(64), odd) == dict(size=(64,64)) and of(None, Resize(64), RandomResizedCrop(32)) == dict(size=(32,32))
