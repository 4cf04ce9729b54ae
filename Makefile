# make demo · make test · make docs: each makes .venv and installs what it needs, once
PYTHON ?= python3
bin = .venv/bin
.PHONY: demo test test-oldest fuzz docs readme

.venv/installed: setup.cfg
	test -x $(bin)/python || $(PYTHON) -m venv .venv
	$(bin)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/installed
	@$(bin)/ranger-compare digits --opts ranger_muon,ranger,adam,sgd --epochs 10 --out demo

# one thread each, as the processes run side by side
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(bin)/nbdev-test
	$(bin)/pytest -n auto --dist worksteal

# the lower bounds of setup.cfg; without notebooks, site, commands under -W error (PyTorch 2.5 warns), and Ranger21 on gradients
# that are constant: centralized and normalized, they are rounding, which is another in each version
oldest = $(shell sed -n '/^install_requires/,/^$$/s/>=/==/p' setup.cfg)
left_out = docs repo commands pages
test-oldest: export OMP_NUM_THREADS = 1
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q --disable-pip-version-check -e '.[peers]' $(oldest) accelerate hypothesis pytest pytest-xdist
	.venv-oldest/bin/pytest -n auto --dist worksteal $(left_out:%=--ignore tests/test_%.py) -k 'not (ranger21 and (rows or one_number))'

fuzz: .venv/installed
	FUZZ=20000 OMP_NUM_THREADS=1 $(bin)/pytest tests/test_fuzz.py

docs: .venv/installed readme
	$(bin)/python docs/make_site.py _docs _proc

readme: .venv/installed
	$(bin)/jupyter nbconvert --log-level WARN --to markdown --template-file nbs/readme.md.j2 --stdout nbs/index.ipynb > README.md
