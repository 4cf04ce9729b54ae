"The site builds without a warning or a broken link, and a browser shows it"
import importlib.util, inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
pytest.importorskip('sphinx', reason="no Sphinx: pip install -e '.[dev]', Python 3.11 or newer")
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

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

@pytest.fixture(scope='module')
def browser():
    "Headless Chromium, which logs the errors of a page and its requests"
    chromium = shutil.which('chromium')
    driver = shutil.which('chromedriver')
    if not chromium or not driver:
        without = pytest.fail if os.environ.get('NEED_BROWSER') else pytest.skip
        without('no Chromium: apt install chromium chromium-driver')
    options = ChromeOptions()
    options.binary_location = chromium
    options.add_argument('--headless')
    options.add_argument('--no-sandbox')
    options.set_capability('goog:loggingPrefs', dict(browser='SEVERE', performance='ALL'))
    with Chrome(options, Service(driver)) as res: yield res

def resize(browser, width):
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)

missing_images = """
    const images = [...document.images]
    for (const o of images) o.loading = "eager"
    const missing = o => o.decode().then(() => [], () => [o.src])
    return Promise.all(images.map(missing)).then(o => o.flat())"""
widest = """
    const boxes = [document.documentElement, ...document.querySelectorAll("main, article")]
    return Math.max(...boxes.map(o => o.scrollWidth))"""

def faults(browser, page):
    "What is wrong with the file `page` on a telephone, by kind"
    resize(browser, 400)
    browser.get(page.as_uri())
    res = dict(images=browser.execute_script(missing_images))
    width = browser.execute_script(widest)
    res['sideways'] = [width] if width > 400 else []
    res['console'] = [o['message'] for o in browser.get_log('browser')]
    events = [json.loads(o['message'])['message'] for o in browser.get_log('performance')]
    urls = [o['params']['request']['url'] for o in events if o['method']=='Network.requestWillBeSent']
    res['requests'] = [o for o in urls if not o.startswith(('file:', 'data:', 'blob:'))]
    return {k: v for k,v in res.items() if v}

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

def test_faults_are_seen(tmp_path, browser):
    page = tmp_path/'a.html'
    page.write_text("""<main><p style="width: 500px">wide</main><img src="x.png">
        <script>console.error('said')</script><script>throw Error('thrown')</script>
        <script src="http://127.0.0.1:9/x.js"></script>""")
    seen = faults(browser, page)
    said = ' '.join(seen.pop('console'))
    assert 'said' in said and 'thrown' in said
    assert seen == dict(images=[(tmp_path/'x.png').as_uri()], sideways=[508], requests=['http://127.0.0.1:9/x.js'])

def test_in_a_browser(browser, site):
    "No page has an error, a picture that is missing, or needs to be moved sideways on a telephone"
    for f in sorted(site.rglob('*.html')): assert not faults(browser, f), f

def test_search(browser, site):
    browser.get((site/'search.html').as_uri()+'?q=muon_step')
    found = '#search-results a[href*="optimizers/muon.html"]'
    WebDriverWait(browser, 30).until(lambda o: o.find_elements(By.CSS_SELECTOR, found))

def test_theme(browser, site):
    resize(browser, 1400)
    browser.get((site/'index.html').as_uri())
    toggle = next(o for o in browser.find_elements(By.CLASS_NAME, 'theme-toggle') if o.is_displayed())
    seen = set()
    for _ in range(3):
        toggle.click()
        seen.add(browser.find_element(By.TAG_NAME, 'body').value_of_css_property('background-color'))
    assert len(seen)==2, seen
