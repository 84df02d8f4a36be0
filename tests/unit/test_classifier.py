"""The classifier for any width, number of classes, channels and size, and what loading refuses."""
import json

import pytest
import torch

from ditnano.classifier import Classifier, load_classifier, save_classifier


@torch.no_grad()
@pytest.mark.parametrize('width, classes, channels, size', [(8,1,1,16), (7,100,3,48), (16,2,1,64), (32,10,3,32)])
def test_any_size_comes_back(width, classes, channels, size, tmp_path):
    net = Classifier(width, classes, channels).eval()
    save_classifier(net, tmp_path/'c', {'data':'none'})
    again, x = load_classifier(tmp_path/'c'), torch.randn(2, channels, size, size)
    assert again(x).shape == (2, classes) and torch.allclose(again(x), net(x), atol=2e-2) and len(again.hash) == 64
    assert not again.train().training and not any(p.requires_grad for p in again.parameters())


def test_a_flipped_bit_and_other_weights_are_named(tmp_path):
    save_classifier(Classifier(8), tmp_path/'c', {})
    path = tmp_path/'c'/'model.safetensors'
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='model.safetensors: damaged or altered'): load_classifier(tmp_path/'c')
    save_classifier(Classifier(8), tmp_path/'d', {})
    d = {k:v for k,v in json.loads((tmp_path/'d'/'config.json').read_text()).items()
         if k not in ('sha256','config_sha256')}
    (tmp_path/'d'/'config.json').write_text(json.dumps(d | {'width':16}))
    with pytest.raises(ValueError, match='expected weights of Classifier'): load_classifier(tmp_path/'d')
    with pytest.raises(FileNotFoundError, match="classifier 'resnet' is not available"): load_classifier('resnet')


def test_the_shipped_ones_load():
    for name in ('digitsnet','digitslens','cifarnet',
                 'cifarlens'): assert load_classifier(name).card['held_out_accuracy'] > 0.5
