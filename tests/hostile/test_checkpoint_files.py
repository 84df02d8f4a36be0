"""Files that mean harm, or were harmed, against `read_checkpoint`: each is refused in one line, and nothing in it runs.

Python's own pickler would not write most of them, so a short assembler for the pickle language makes them: a capital
letter (or a name) gives the bytes that push one value. What they would run leaves a file, the canary, in the working
directory.
"""
import io
import math
import pickle
import random
import struct
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ditnano.interop.checkpoint import read_checkpoint

MAGIC = 0x1950a86a20f9469cfc6c   # of torch.save's old format
SOURCE = "open('canary','w').write('was run')"


class Order:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


BAD = pickle.dumps({'ema': Order(exec, SOURCE)})


# the assembler ----------------------------------------------------------------------------------------------------

def S(text): return b'X'+struct.pack('<I', len(text.encode()))+text.encode()
def I(n): return b'J'+struct.pack('<i', n) if abs(n)<2**31 else b'\x8a\x10'+n.to_bytes(16,'little',signed=True)
def T(*parts): return b'('+b''.join(parts)+b't'
def L(*parts): return b'](' + b''.join(parts) + b'e'
def D(**parts): return b'}('+b''.join(S(k)+v for k,v in parts.items())+b'u'
def G(dotted): return S(dotted.rpartition('.')[0])+S(dotted.rpartition('.')[2])+b'\x93'
def R(dotted, *args): return G(dotted)+T(*args)+b'R'
def B(data): return b'B'+struct.pack('<I', len(data))+data
def P(program): return b'\x80\x04'+program+b'.'

ORDERED = R('collections.OrderedDict')
def nested(numbers=(1.,2.,3.,4.), declared=None, kind='torch.FloatStorage', refer=None, magic=MAGIC, keys=('k',),
           count=None, tail=b'', load='torch.storage._load_from_bytes'):
    declared = len(numbers) if declared is None else declared
    refer = T(S('storage'), G(kind), S('k'), S('cpu'), I(declared), b'N')+b'Q' if refer is None else refer
    parts = [I(magic), I(1001), D(little_endian=b'\x88'), refer, L(*map(S, keys))]
    return R(load, B(b''.join(map(P, parts)) + struct.pack('<q', declared if count is None else count)
                     + np.array(numbers, '<f4').tobytes() + tail))

def tensor(storage=None, offset=0, size=(2,2), stride=(2,1)):
    return R('torch._utils._rebuild_tensor_v2', storage or nested(), I(offset), T(*map(I,size)), T(*map(I,stride)),
             b'\x89', ORDERED)
def parameter(t=None): return R('torch._utils._rebuild_parameter', t or tensor(), b'\x88', ORDERED)
def thing(name='Net', **state):
    return R('torch_utils.persistence._reconstruct_persistent_obj',
             D(type=S('class'), module_src=S(SOURCE), class_name=S(name), state=D(**state)))
def module(w=None, **kw):
    return thing(**dict(_parameters=D(w=w or parameter()), _buffers=b'}', _modules=b'}',
                        _init_kwargs=D(depth=I(3))) | kw)
def file(w=None, **kw): return P(D(ema=module(w, **kw)))

def archive(pickled=None, compress=zipfile.ZIP_STORED, **members):
    program = P(D(w=tensor(T(S('storage'), G('torch.FloatStorage'), S('0'), S('cpu'), I(4))
                           +b'Q'))) if pickled is None else pickled
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compress) as z:
        for k,v in ({'data.pkl':program, 'data/0':np.arange(4, dtype='<f4').tobytes()} | members).items():
            if v is not None: z.writestr(f'archive/{k}', v)
    return buffer.getvalue()


# the attempts -----------------------------------------------------------------------------------------------------

RUN = S(SOURCE)

# words: called, in a tensor's place, deep inside, in a nested file, where nobody reads, in old spelling, in disguise
words = [(BAD, 'names builtins.exec; expected nothing but tensors, numbers, strings and containers'),
         (P(D(ema=R('os.system', S('touch it')))), 'x.pkl: names os.system'),
         (P(D(ema=R('builtins.eval', RUN))), 'names builtins.eval'),
         (P(R('builtins.getattr', R('builtins.__import__', S('os')), S('system'))), 'names builtins.getattr'),
         (file(G('os.system')), 'names os.system'),
         (file(tensor(R('builtins.eval', RUN))), 'names builtins.eval'),
         (file(_init_kwargs=D(a=R('builtins.eval', RUN))), 'names builtins.eval'),
         (P(D(ema=module(), beside=R('os.system', S('touch it')))), 'names os.system'),
         (file(tensor(nested(refer=R('builtins.eval', RUN)))), 'names builtins.eval'),
         (file(tensor(nested(kind='os.system'))), 'names os.system'),
         (file(tensor(nested(refer=nested()))), 'names torch.storage._load_from_bytes'),
         (file(tensor(nested(load='torch.load'))), 'names torch.load'),
         (P(b'cposix\nsystem\n'+T(S('touch it'))+b'R'), 'names posix.system'),
         (P(S('torch')+S('os.system')+b'\x93'), 'names torch.os.system'),
         (P(S('os\nsystem'*50)+S('x')+b'\x93'), 'names os'),
         (P(S('collections')+S('OrderedDict.__init__')+b'\x93'), 'names collections.OrderedDict.__init__'),
         (P(I(3)+S('system')+b'\x93'), 'a module is a number; expected a string')]

# instructions that are not there, and permitted words put to odd uses
MODULEDICT, PERSISTENT = 'torch.nn.modules.container.ModuleDict', 'torch_utils.persistence._reconstruct_persistent_obj'
odd = [(P(b'('+b'ios\nsystem\n'), 'has instruction INST'),
       (P(b'('+G('collections.OrderedDict')+b'o'), 'has instruction OBJ'),
       (P(b'\x82\x01'), 'has instruction EXT1'),
       (P(b'Pabc\n'), 'has instruction PERSID'), (P(S('k')+b'Q'), 'has instruction BINPERSID'),
       (P(b'\xff'), 'has instruction 0xff'), (P(b'L1\nL'), 'has instruction LONG'),
       (P(b'\x8e'+struct.pack('<Q', 2**60)), 'has instruction BINBYTES8'), (P(b'\x92'), 'has instruction NEWOBJ_EX'),
       (P(b'}2'), 'has instruction DUP'), (b'\x80\x63.', 'pickle of protocol 99'), (b'hello', 'expected'),
       (b'', 'cut short'),
       (P(R('collections.OrderedDict', L(T(S('a'), I(1))))),
        'gives 1 arguments to collections.OrderedDict; expected 0'),
       (P(G('collections.OrderedDict')+I(3)+b'R'), 'what is given to a function is a number; expected a tuple'),
       (P(I(3)+b')R'), 'calls a number'), (P(S('os.system')+b')R'), 'calls a string'),
       (P(D(ema=tensor(nested(refer=G('torch.FloatStorage')+b')R')))), 'calls the name torch.FloatStorage'),
       (P(G('collections.OrderedDict')+D(__call__=RUN)+b'b'), 'sets attributes of the name collections.OrderedDict'),
       (P(G(PERSISTENT)+D(__code__=RUN)+b'b'),
        'sets attributes of the name torch_utils.persistence._reconstruct_persistent_obj'),
       (P(b'}'+D(a=b'N')+b'b'), 'sets attributes of a dictionary'),
       (P(tensor()+D(storage=b'N')+b'b'), 'sets attributes of a tensor'),
       (P(G(MODULEDICT)+b')\x81'+D(_parameters=b'}')+b'b'+D(_parameters=b'N')+b'b'), 'sets attributes of an object'),
       (P(module()+D(state=b'N')+b'b'), 'sets attributes of an object'),
       (P(ORDERED+I(3)+b'b'), 'a state is a number; expected a dictionary'),
       (P(G('collections.OrderedDict')+S('k')+I(1)+b's'),
        'what takes entries is the name collections.OrderedDict; expected a dictionary'),
       (P(b'}'+I(3)+I(1)+b's'), 'a key is a number; expected a string'), (P(b'}'+b'))\x85'+b's'), 'a key is a tuple'),
       (P(b'}'+b'('+S('a')+b'u'), 'expected keys and values'),
       (P(ORDERED+b'a'), 'damaged'), (P(b'h\x07'), 'expected something made before'), (P(b'u'), 'expected a mark'),
       (P(b'(R'), 'expected something on the stack'), (P(b'\x8a\xff'), 'a number of 255 bytes'),
       (P(R('numpy.dtype', S('O8'), b'\x89', b'\x88')), 'a numpy number of type O8; expected f8'),
       (P(R('numpy.core.multiarray.scalar', S('f8'), B(b'12345678'))), 'a numpy number is odd')]

# tensors that are none, or that reach beyond their numbers
inf = math.inf
tensors = [(file(I(3)), 'w is a number; expected a tensor'), (file(T(I(1), I(2))), 'w is a tuple; expected a tensor'),
           (file(G(MODULEDICT)+b')\x81'), 'w is an object; expected a tensor'),
           (file(nested()), 'w is bare numbers; expected a tensor'), (file(G(PERSISTENT)), 'w is the name torch_utils'),
           (file(R('torch._utils._rebuild_parameter', b'N', b'\x88', ORDERED)),
            'a parameter is nothing; expected a tensor'),
           (file(tensor(I(3))), 'what a tensor stands on is a number; expected bare numbers'),
           (file(tensor(offset=1)), 'w reaches outside its 4 numbers'),
           (file(tensor(size=(2,3), stride=(3,1))), 'reaches outside'),
           (file(tensor(stride=(4,1))), 'reaches outside'), (file(tensor(offset=2**39)), 'reaches outside'),
           (file(tensor(size=(2**39,2**39), stride=(0,0))), 'larger than the file'),
           (file(tensor(size=(5,), stride=(0,))), 'reaches outside'),
           (file(tensor(offset=-1)), 'an offset holds a number out of range'),
           (file(tensor(stride=(-2,1))), 'a stride holds a number out of range'),
           (file(tensor(size=(2**100,2))), 'a shape holds a number out of range'),
           (file(tensor(size=(2,))), 'a tensor has 1 sizes and 2 strides'),
           (file(tensor(size=(1,)*9, stride=(1,)*9)), '8 at most'), (file(tensor(size=(0,2))), 'reaches outside'),
           (file(R('torch._utils._rebuild_tensor_v2', nested(), I(0), L(I(2)), L(I(1)), b'\x89', ORDERED)),
            'a shape is a list; expected a tuple'),
           (file(tensor(nested((1.,inf,2.,3.)))), 'w is not finite'),
           (file(tensor(nested((1.,float('nan'),2.,3.)))), 'w is not finite')]

# nested files that are not what they say
ref = lambda *said: T(*said)+b'Q'
nests = [(nested(declared=5), 'damaged or cut short'), (nested(declared=3), 'missing or left over'),
         (nested(declared=2**39), 'expected 549755813888 numbers'), (nested(count=2), 'expected 4 numbers'),
         (nested(count=-4), 'expected 4 numbers'),
         (nested(magic=7), "not in torch.save's old format"), (nested(keys=()), 'missing or left over'),
         (nested(keys=('k','k')), 'or twice'), (nested(keys=('k','other')), 'not there'),
         (nested(tail=b'x'), 'left over'),
         (nested(refer=b'N'), 'not there'), (nested(refer=T()+b'Q'), 'refers to something else'),
         (nested(refer=ref(S('module'), G('torch.FloatStorage'), S('k'), S('cpu'), I(4), b'N')),
          'refers to something else'),
         (nested(refer=ref(S('storage'), S('torch.FloatStorage'), S('k'), S('cpu'), I(4), b'N')),
          'refers to something else'), (nested(kind='torch.LongStorage'), 'names torch.LongStorage'),
         (R('torch.storage._load_from_bytes', B(b'')), 'cut short'),
         (R('torch.storage._load_from_bytes', S('text')), 'a nested file is a string; expected bytes'),
         (R('torch.storage._load_from_bytes', B(BAD)), 'names builtins.exec')]

# things without end
def deeper(m, n):
    for _ in range(n): m = module(_modules=D(a=m))
    return m

EMPTY = S('_parameters')+b'}'+S('_buffers')+b'}'+S('_init_kwargs')+b'}'
def inner(state): return R(PERSISTENT, D(type=S('class'), class_name=S('N'), state=state))
itself = P(D(ema=inner(b'}q\x05('+EMPTY+S('_modules')+D(a=inner(b'h\x05')+b'q\x06', b=b'h\x06')+b'u')))
twins = P(D(ema=module(_modules=D(a=module()+b'q\x01', b=b'h\x01'))))
laughs = T(b']q\x00', *(b'](h'+bytes([k])+b'h'+bytes([k])+b'eq'+bytes([k+1]) for k in range(30)))
whole = dict(size=(1000,), stride=(1,))
again = b''.join(S(f'w{k}')+tensor(b'h\x09', **whole) for k in range(40))
heavy = P(D(ema=module(_parameters=b'}('+S('a')+tensor(nested(range(1000))+b'q\x09', **whole)+again+b'u')))
endless = [(P(b'}'*1_500_000), 'more than 1,000,000 instructions'),
           (P(D(ema=deeper(module(), 20))), 'appears twice or too deep'), (itself, 'appears twice or too deep'),
           (twins, 'b appears twice'),
           (P(b'})'+b'\x85'*900_000+b'Ns'), 'a key is a tuple'),   # pickle.Unpickler would hash it, and crash
           (heavy, 'are larger than the file'), (file(_init_kwargs=D(a=laughs)), 'too many or nested too deep'),
           (file(_init_kwargs=D(a=L(*[I(k) for k in range(1001)]))), 'too many'),
           (file(_init_kwargs=D(a=tensor())), 'a constructor value is a tensor'),
           (file(_init_kwargs=D(a=S('x'*2000))), 'a constructor value is a string'),
           (file(_modules=D(**{'x'*100_000:module()})), 'has a name of over 200 characters')]

# harmless, but no network
empty = [(P(D(net=module())), "has no entry 'ema'"), (P(L()), "has no entry 'ema'"),
         (P(D(ema=I(3))), 'the network is a number; expected an object'), (P(D(ema=b'}')), 'holds no tensors'),
         (P(D(ema=G(MODULEDICT)+b')\x81')), 'the network is nothing; expected a dictionary'),
         (file(_buffers=b'N'), '_buffers of the network is nothing; expected a dictionary'),
         (file(_modules=L()), '_modules of the network is a list'),
         (file(_init_kwargs=b'N'), '_init_kwargs is nothing'),
         (file(_modules=D(a=I(1))), 'a is a number; expected an object'),
         (file(_parameters=D(w=b'N')), 'holds no tensors'), (file(_buffers=D(w=tensor())), 'w appears twice'),
         (P(D(ema=R(PERSISTENT, D(type=S('module'))))), 'another type than class'),
         (P(R(PERSISTENT, I(1))), 'a persistent object is a number')]

# archives whose members are compressed, missing, or of another length
inside = lambda n: P(D(w=tensor(T(S('storage'), G('torch.FloatStorage'), S('0'), S('cpu'), I(n))+b'Q')))
zips = [(archive(compress=zipfile.ZIP_DEFLATED), 'compressed or oversized'),
        (archive(**{'data/0':b''}), 'a storage of 4 numbers has 0 bytes'),
        (archive(**{'data/0':None}), 'an archive without data/0'),
        (archive(inside(3)), 'a storage of 3 numbers has 16 bytes'),
        (archive(inside(2**39)), 'a storage of 549755813888 numbers'),
        (archive(**{'data.pkl':None}), 'an archive without data.pkl'), (archive(byteorder=b'big'), 'big-endian'),
        (archive(BAD), 'names builtins.exec'),
        (archive(P(D(w=nested()))), 'names torch.storage._load_from_bytes'), (archive()[:-30], 'damaged or cut short'),
        (archive().replace(b'data/0', b'data/1', 1), 'damaged or cut short'),
        (b'PK\x03\x04'+bytes(100), 'damaged or cut short')]

ATTEMPTS = {'words':words, 'odd uses':odd, 'tensors':tensors, 'nested files':[(file(tensor(s)), t) for s,t in nests],
            'endless':endless, 'empty':empty, 'archives':zips}


# the tests --------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "An empty working directory; the canary must not be in it afterwards."
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path('canary').exists()


def read(data, name='x.pkl'):
    Path(name).write_bytes(data)
    return read_checkpoint(name)


def told(data, name='x.pkl'):
    "What is said of a file that is refused: one short line with its name. None if it is read."
    try: weights, _ = read(data, name)
    except ValueError as e:
        assert '\n' not in str(e) and str(e).startswith(name+': ') and len(str(e)) < 300 and '; expected' in str(e)
        return str(e)
    assert all(v.isfinite().all() for v in weights.values())


def test_the_canary_works():
    pickle.loads(BAD)
    assert Path('canary').exists()
    Path('canary').unlink()


def test_the_assembler_writes_files_that_are_read():
    weights, info = read(file())
    assert weights['w'].tolist() == [[1., 2.], [3., 4.]]
    assert (info['class_name'], info['init_kwargs']) == ('Net', {'depth':3})
    assert read(file(tensor(size=(2,2), stride=(1,2))))[0]['w'].tolist() == [[1., 3.], [2., 4.]]
    assert read(archive(), 'x.pt')[0]['w'].tolist() == [[0., 1.], [2., 3.]]


@pytest.mark.parametrize('kind,i', [(kind, i) for kind,attempts in ATTEMPTS.items() for i in range(len(attempts))])
def test_refused(kind, i):
    data, text = ATTEMPTS[kind][i]
    said = told(data)
    assert said and text in said


@pytest.mark.parametrize('core', ['core', '_core'])
def test_numbers_of_old_and_new_numpy_are_read(core):
    kind = R('numpy.dtype', S('f8'), b'\x89', b'\x88')+T(I(3), S('<'), b'N', b'N', b'N', I(-1), I(-1), I(0))+b'b'
    number = R(f'numpy.{core}.multiarray.scalar', kind, B(struct.pack('<d', 0.5)))
    assert read(file(_init_kwargs=D(scale=number)))[1]['init_kwargs'] == {'scale': 0.5}


@pytest.mark.parametrize('zipped', [True, False])
def test_state_dicts_are_read_as_torch_reads_them(zipped):
    "Transposed tensors, two that share their numbers, other precisions, parameters, and torch's notes of versions."
    shared = torch.randn(6, 4)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GroupNorm(1, 2)).state_dict()
    state |= {'transposed':shared.T, 'slice':shared[1:3,::2], 'half':torch.randn(3).half(), 'one':torch.tensor(2.),
              'double':torch.randn(2, 1).double(), 'parameter':torch.nn.Parameter(torch.ones(2))}
    torch.save(state, 'x.pt', _use_new_zipfile_serialization=zipped)
    (weights, info), expected = read_checkpoint('x.pt'), torch.load('x.pt', weights_only=True)
    assert (list(weights), info['class_name']) == (list(expected), None)
    assert info['format'] == ('torch.save' if zipped else 'torch.save, old')
    for k, v in expected.items(): assert weights[k].dtype == v.dtype and torch.equal(weights[k], v), k


def test_reading_imports_compiles_and_executes_nothing():
    "Python reports imports, compilations, executions and opened files to an audit hook."
    events, listening = set(), []
    sys.addaudithook(lambda event, args: listening and listening[0] == threading.get_ident() and events.add(event))
    Path('x.pkl').write_bytes(file())
    listening.append(threading.get_ident())
    try:
        read_checkpoint('x.pkl')
        reading = events.copy()
        pickle.loads(BAD)
    finally: listening.clear()
    Path('canary').unlink()
    assert reading <= {'open', 'builtins.id'}   # the second asks whether a module was met before
    assert {'exec', 'compile', 'pickle.find_class'} <= events


def test_attributes_of_an_ordered_dictionary_go_nowhere():
    noted = P(D(ema=ORDERED+S('w')+tensor()+b's'+D(_metadata=b'}', __class__=S('x'), update=b'N')+b'b'))
    assert list(read(noted)[0]) == ['w']


def test_what_is_deep_and_beside_the_network_is_read_past():
    deep = P(D(ema=module(), beside=b']'*200_000+b'a'*199_999))
    assert list(read(deep)[0]) == ['w']


def test_no_such_file(tmp_path):
    for name in ('nobody.pkl', tmp_path):
        with pytest.raises(FileNotFoundError, match='no such file'): read_checkpoint(name)


def saved(zipped):
    state, buffer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)).state_dict(), io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize('name', ['pickle', 'archive', 'zip', 'old'])
def test_cut_and_scratched(name):
    "Cut at every byte nothing passes for the whole; with bytes changed, nothing comes out but weights or a ValueError."
    data = {'pickle':file, 'archive':archive, 'zip':lambda: saved(True), 'old':lambda: saved(False)}[name]()
    assert told(data) is None
    for n in range(0, len(data), 1+len(data)//2000): assert told(data[:n]), n
    chance, refused = random.Random(0), 0
    for _ in range(300):
        scratched = bytearray(data)
        for _ in range(chance.choice((1,1,3))): scratched[chance.randrange(len(data))] = chance.randrange(256)
        refused += told(bytes(scratched)) is not None
    assert 0 < refused < 300
