"The Hub, against a stand-in server on this machine: upload, page, load by branch and commit, and what goes wrong."
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip('huggingface_hub')


class StandIn(BaseHTTPRequestHandler):
    "As much of the Hub's protocol as one commit and one download need."
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def answer(self, status, body=b'', **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(status)
        for k,v in {'Content-Length':len(body), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def body(self):
        if 'Content-Length' in self.headers: return self.rfile.read(int(self.headers['Content-Length']))
        parts = []
        while n := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(n))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def do_POST(self):
        data, commits = self.body(), self.server.commits
        self.server.log.append(f'POST {self.path}')
        if self.path == '/api/repos/create': return self.answer(200, {'url':self.server.url+'/someone/student'})
        if self.path == '/api/validate-yaml': return self.answer(200, {'errors':[], 'warnings':[]})
        if '/preupload/' in self.path:
            names = [f['path'] for f in json.loads(data)['files']]
            files = [{'path':n, 'uploadMode':'regular', 'shouldIgnore':False} for n in names]
            return self.answer(200, {'files':files})
        if '/commit/' in self.path:
            lines = [json.loads(line) for line in data.decode().splitlines()]
            files = {d['value']['path']:base64.b64decode(d['value']['content']) for d in lines if d['key']=='file'}
            sha = hashlib.sha1(repr(sorted(files)).encode()+str(len(commits)).encode()).hexdigest()
            commits[sha] = commits['main'] = files
            self.server.heads['main'] = sha
            return self.answer(200, {'commitUrl':f'{self.server.url}/someone/student/commit/{sha}', 'commitOid':sha,
                                     'success':True})
        self.answer(404)

    def do_GET(self):
        path = self.path.split('?')[0]
        self.server.log.append(f'{self.command} {path}')
        if 'broken' in path: return self.answer(500, {'error':'out of order'})
        if not path.startswith(('/api/models/someone/student', '/someone/student/resolve/')):
            return self.answer(404, X_Error_Code='RepoNotFound')
        parts = path.split('/')
        before = next((word for word in ('revision', 'resolve', 'tree') if word in parts), None)
        revision = parts[parts.index(before)+1] if before else 'main'
        files, sha = self.server.commits.get(revision), self.server.heads.get(revision, revision)
        if files is None: return self.answer(404, X_Error_Code='RevisionNotFound')
        if 'resolve' in parts:
            content = files.get(parts[-1])
            if content is None: return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
            return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)
        if 'tree' in parts:
            oid = {n:hashlib.sha1(c).hexdigest() for n,c in files.items()}
            rows = [{'type':'file', 'path':n, 'size':len(c), 'oid':oid[n]} for n,c in files.items()]
            return self.answer(200, rows)
        siblings = [{'rfilename':n} for n in files]
        self.answer(200, {'id':'someone/student', 'sha':sha, 'private':False, 'siblings':siblings, 'tags':[],
                          'downloads':0, 'likes':0})

    do_HEAD = do_GET


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), StandIn)
    s.url, s.commits, s.heads, s.log = f'http://127.0.0.1:{s.server_port}', {}, {}, []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()


@pytest.fixture
def python(programs, server, tmp_path):
    "Runs code in a process of its own, whose Hub is the stand-in; what it prints."
    env = {'HF_ENDPOINT':server.url, 'HF_HOME':tmp_path, 'HF_TOKEN':'hf_x', 'HF_HUB_DISABLE_TELEMETRY':'1',
           'HF_HUB_DISABLE_XET':'1', 'HF_HUB_DISABLE_PROGRESS_BARS':'1', 'NO_PROXY':'127.0.0.1', 'no_proxy':'127.0.0.1'}

    def run(code):
        done = programs.run('-c', code, env=env, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    return run


PUSH = """
import torch
from ditnano import DiT, DiTConfig, GET, GETConfig
from ditnano.dit import randomize_weights
model = randomize_weights(DiT(DiTConfig(1, 32)), 1).eval()
model.card = {'data':'none', 'scores':{'FD-x':1.5}}
print(model.push_to_hub('someone/student', half=True))
print(randomize_weights(GET(GETConfig(1, 32, 4, 1)), 1).push_to_hub('someone/student', message='a GET'))
"""

PULL = """
import torch
from ditnano import DiT, GET, load_model
from ditnano.dit import randomize_weights
model = DiT.from_pretrained('someone/student', revision='{first}')
same = randomize_weights(DiT(model.cfg), 1).eval()
x, t, y = torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([1, 2])
with torch.no_grad(): print((model(x, t, y)-same(x, t, y)).abs().max().item() < 0.02, model(x, t, y).std().item() > 0.1)
print(model.card, type(load_model('someone/student')).__name__, GET.from_pretrained('someone/student').cfg.eq_depth)
for name, revision in (('someone/other', None), ('someone/student', 'v9'), ('someone/broken', None), ('a b/c', None)):
    try: DiT.from_pretrained(name, revision)
    except FileNotFoundError as e: print(e)
"""


@pytest.mark.slow
def test_upload_and_load(server, python):
    first, second = python(PUSH).split()
    assert set(server.commits['main']) == {'config.json', 'model.safetensors', 'README.md'}
    first = first.rsplit('/', 1)[1]
    page = server.commits[first]['README.md'].decode()
    assert page.startswith('---\n') and 'library_name: ditnano' in page and '| scores.FD-x | 1.5 |' in page
    assert len(server.commits[first]['model.safetensors']) < 2*60_000   # float16

    lines = python(PULL.format(first=first)).splitlines()
    assert lines[:2] == ['True True', "{'data': 'none', 'scores': {'FD-x': 1.5}} GET 1"]
    assert lines[2].startswith('someone/other: no folder, and not fetched from the Hub (')
    assert lines[3].startswith('someone/student at v9: no folder, and not fetched from the Hub (')
    assert lines[4].startswith('someone/broken: no folder, and not fetched from the Hub (')
    assert lines[5].startswith('student a b/c: no folder and no shipped student') and len(lines) == 6


@pytest.mark.slow
def test_a_damaged_or_incomplete_download_is_named(server, python, tmp_path):
    from ditnano import DiT
    DiT.from_pretrained('nano-digits').save_pretrained(tmp_path/'w')
    whole = {p.name:p.read_bytes() for p in (tmp_path/'w').iterdir()}
    for n,changed in ((1, whole['model.safetensors'][:-1]+b'\x7f'), (2, None)):
        files = {'config.json':whole['config.json'], 'model.safetensors':changed}
        server.commits[str(n)*40] = {k:v for k,v in files.items() if v}
    code = ("from ditnano import DiT\nfor n in '12':\n"
            "    try: DiT.from_pretrained('someone/student', n*40)\n"
            "    except (ValueError, FileNotFoundError) as e: print(e)")
    damaged, missing = python(code).splitlines()
    assert 'model.safetensors: damaged or altered' in damaged and 'no model.safetensors in that repository' in missing


@pytest.mark.slow
def test_names_and_folders_fetch_nothing(server, python, tmp_path):
    (tmp_path/'runs').mkdir()
    code = ("from ditnano import DiT\nDiT.from_pretrained('nano-digits').save_pretrained('runs/mine')\n"
            "DiT.from_pretrained('runs/mine')\n"
            "for args in (('runs/yours',), ('nano-9m',), ('./a/b',), ('runs/mine', 'v1')):\n"
            "    try: DiT.from_pretrained(*args)\n    except (FileNotFoundError, ValueError) as e: print(e)")
    lines = python(code).splitlines()
    assert [line.split(': no ')[0] for line in lines[:3]] == ['student runs/yours', 'student nano-9m', 'student ./a/b']
    assert server.log == []
    assert lines[3] == "revision 'v1' of runs/mine: expected a Hub id, 'owner/name'"
