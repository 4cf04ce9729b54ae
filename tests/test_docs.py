"The site builds without a warning or a broken link, and a browser shows it"
import importlib.util, inspect, json, re, shutil, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import pytest
pytest.importorskip('sphinx')
from websockets.sync.client import connect

import fastai_ranger.all

root = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('make_site', root/'docs/make_site.py')
make_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_site)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    d = tmp_path_factory.mktemp('docs')
    res = subprocess.run([sys.executable, root/'docs/make_site.py', d/'site', d/'staged'], cwd=root, capture_output=True, text=True, timeout=300)
    assert not res.returncode, res.stdout+res.stderr
    return d/'site'

class Browser:
    "A page in headless Chromium, over its DevTools protocol"
    def __init__(self, binary, profile):
        self.proc = subprocess.Popen([binary, '--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0', f'--user-data-dir={profile}', 'about:blank'],
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        f = profile/'DevToolsActivePort'
        until(lambda: f.exists() and f.read_text().count('\n'))
        port = f.read_text().split('\n')[0]
        page = next(o for o in json.load(urlopen(f'http://127.0.0.1:{port}/json')) if o['type']=='page')
        self.stack,self.n,self.events = ExitStack(),0,[]
        self.ws = self.stack.enter_context(connect(page['webSocketDebuggerUrl'], max_size=None))
        for o in ('Page', 'Runtime', 'Log', 'Network'): self(f'{o}.enable')

    def __call__(self, method, **params):
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            res = json.loads(self.ws.recv(timeout=60))
            if res.get('id')==self.n:
                assert 'error' not in res, res
                return res['result']
            self.events.append(res)

    def js(self, code): return self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)['result'].get('value')

    def open(self, url):
        self.events = []
        self('Page.navigate', url=url)
        until(lambda: self.js(f'location.href.split("#")[0]')==url.split('#')[0] and self.js('document.readyState')=='complete')

    def width(self, n): self('Emulation.setDeviceMetricsOverride', width=n, height=900, deviceScaleFactor=1, mobile=False)

    def troubles(self):
        "What the console says, and what came from elsewhere than the site"
        for e in self.events:
            m,p = e['method'],e['params']
            if m=='Runtime.exceptionThrown' or m=='Runtime.consoleAPICalled' and p['type']=='error' or m=='Log.entryAdded' and p['entry']['level']=='error': yield json.dumps(p)
            if m=='Network.requestWillBeSent' and not re.match('(file|data|blob):', p['request']['url']): yield p['request']['url']

    def close(self):
        self.stack.close()
        self.proc.terminate()
        self.proc.wait()

def until(ok, timeout=30):
    end = time.time()+timeout
    while not ok():
        assert time.time()<end
        time.sleep(.05)

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    binary = shutil.which('chromium')
    if not binary: pytest.skip('no chromium')
    res = Browser(binary, tmp_path_factory.mktemp('profile'))
    yield res
    res.close()

def test_a_page_for_each_notebook(site):
    names = [f.relative_to(root/'nbs').with_suffix('') for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
    assert names and not [o for o in names if not (site/f'{o}.html').exists() or not (site/f'{o}.md').exists()]
    assert not [o for o in names if '#|' in (site/f'{o}.html').read_text()]
    assert (site/'llms.txt').read_text().count('.md)') >= len(names)

def test_a_name_has_its_parameters_and_source(site):
    text = (site/'optimizers/muon.html').read_text()
    assert 'id="fastai_ranger.optimizers.muon.ranger_muon"' in text and '_modules/fastai_ranger/optimizers/muon.html#ranger_muon' in text
    assert not [f for f in site.rglob('*.html') if re.search('(?<!<td>)<p>None</p>', f.read_text())]
    assert '<summary' in (site/'explanation/architecture.html').read_text() # code that is folded
    assert '<math' in (site/'optimizers/adam.html').read_text()

public = {k: o for k,o in vars(fastai_ranger.all).items() if getattr(o, '__module__', '').startswith('fastai_ranger')}

@pytest.mark.parametrize('name', public)
def test_each_parameter_is_explained(name):
    o = public[name]
    assert o.__doc__
    rows = [[c.strip() for c in r.split('|')[1:-1]] for r in make_site.table(o).split('\n')[2:] if r.startswith('|')]
    said = {r[0] for r in rows if r[-1]}
    params = inspect.signature(o).parameters.values() if make_site.signature(o) else ()
    assert not [p.name for p in params if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in said]
    assert not [r[0] for r in rows if not r[-1] and r[0] != '**Returns**']

def test_broken_links_are_seen(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html"></a><a href="#x"></a><img src="https://host/x.png"><a href="https://host/"></a><p id="y"><a href="#y"></a>')
    assert [o.split(': ')[-1] for o in make_site.broken(tmp_path)] == ['no such file', 'no such anchor', 'from the net']

def test_in_a_browser(site, browser):
    "No page has an error, a picture that is missing, or needs to be moved sideways on a telephone"
    for f in sorted(site.rglob('*.html')):
        browser.width(400)
        browser.open(f.as_uri())
        assert not list(browser.troubles()), f
        assert browser.js('[...document.images].every(o => (o.loading="eager", true)) && Promise.all([...document.images].map(o => o.decode().then(() => true, () => false))).then(a => a.every(o => o))'), f
        assert browser.js('Math.max(...[document.documentElement, ...document.querySelectorAll("main, article")].map(o => o.scrollWidth))') <= 400, f

def test_search(site, browser):
    browser.open((site/'search.html').as_uri()+'?q=muon_step')
    until(lambda: browser.js('[...document.querySelectorAll("#search-results a")].some(o => o.href.includes("optimizers/muon.html"))'))

def test_theme(site, browser):
    browser.width(1400)
    browser.open((site/'index.html').as_uri())
    color = 'getComputedStyle(document.body).backgroundColor'
    seen = set()
    for _ in range(3):
        browser.js('[...document.querySelectorAll(".theme-toggle")].find(o => o.offsetParent).click()')
        seen.add(browser.js(color))
    assert len(seen)==2, seen
