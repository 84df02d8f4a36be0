# Everything a person types. The names of nbdev's commands stand in this file and nowhere else.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev,notebooks,cluster,export,judges,hub
JOBS   ?= 2
SCALE  ?=
NB     ?=
# Shipped weights that `make weights` makes again, in this order
WEIGHTS ?= digitsnet digitslens teacher-digits32 pairs-digits32 nano-digits cifarnet cifarlens teacher-cifar10-small

BIN   := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
export PATH := $(BIN):$(PATH)
.DEFAULT_GOAL := help
.PHONY: help venv paper smoke test test-quick lint prepare check export clean readme lab weights docs dist hooks precommit trust faults

help: ## This list; with NB=nbs/experiments/x.ipynb, the parameters of that notebook
ifneq ($(NB),)
	@$(MAKE) -s venv
	@$(BIN)/papermill --help-notebook $(NB)
else
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
endif

venv: $(STAMP) ## The virtual environment, when it is absent or older than its pins

$(STAMP): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info>=(3,10) else f"$(PYTHON) is Python {sys.version.split()[0]}; expected 3.10 or later (make PYTHON=python3.11 ...)")'
	@echo "Installing into $(VENV): a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' \
	  $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info>=(3,11) else "")')
	@touch $@

paper: $(STAMP) ## Every table and figure into paper_figures/ (SCALE=smoke, cpu, night, gpu or paper runs what is missing first)
	$(BIN)/ditnano paper $(if $(SCALE),--scale $(SCALE))

smoke: $(STAMP) ## Everything again at scale smoke, experiments included, into paper_figures/smoke: proof that every path works
	$(BIN)/ditnano paper --scale smoke --out paper_figures/smoke

test: $(STAMP) ## Every notebook top to bottom, and all tests of tests/
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests

test-quick: $(STAMP) ## The everyday loop, under a minute: no notebooks, nothing marked slow
	$(BIN)/python -m pytest -n $(JOBS) -m quick tests/unit tests/contract tests/hostile

faults: $(STAMP) ## The whole campaign of faults (20 minutes): kills, damage, full disks, races; ARGS="--only kill --seed 1"
	$(BIN)/python tests/faults/campaign --whole --jobs 2 $(ARGS)

lint: $(STAMP) ## ruff: 120 columns, one statement a line, unused and unsorted imports, common mistakes
	@$(BIN)/ruff check .

prepare: $(STAMP) ## Before a commit: export, clean, README, test
	@$(MAKE) -s export clean readme
	@$(MAKE) test

check: lint ## Lint; then export, clean and README again: none of them may change a file
	@state() { for f in $$(find nbs ditnano -name '*.ipynb' -o -name '*.py' | grep -v checkpoints | sort) README.md pyproject.toml; do cksum $$f; done; }; \
	before=$$(state); $(MAKE) -s export clean readme || exit 1; after=$$(state); \
	if [ "$$before" != "$$after" ]; then diff <(echo "$$before") <(echo "$$after") | awk '/^>/ {print "  " $$4}' >&2; \
	  echo "check: these files were not as export, clean and readme leave them; now they are, so stage and commit them" >&2; exit 1; fi; \
	echo "check: export, clean and README.md are up to date"

export: $(STAMP) ## Write ditnano/*.py from the notebooks
	@$(BIN)/nbdev_export

clean: $(STAMP) ## Strip run counts and editor metadata from the notebooks
	@$(BIN)/nbdev_clean

# Links in the index are relative to nbs/; in README.md they start at the top.
readme: $(STAMP) ## README.md from nbs/index.ipynb
	@$(BIN)/python -c "import json; nb=json.load(open('nbs/index.ipynb')); nb['metadata']['language_info']={'name':'python'}; print(json.dumps(nb))" | \
	  $(BIN)/jupyter nbconvert --to markdown --stdin --stdout --log-level ERROR \
	  --RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns '^#\|\s*(hide|default_exp)' \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags hide-input \
	  > README.md.tmp || { rm -f README.md.tmp; exit 1; }
	@sed -e '/^#| /d' -e 's#](\([0-9a-z_/]*\.ipynb\)#](nbs/\1#g' -e 's#](\.\./#](#g' README.md.tmp | cat -s | sed -e '1{/^$$/d;}' > README.md
	@rm -f README.md.tmp

lab: $(STAMP) ## JupyterLab in nbs/
	$(BIN)/jupyter lab --notebook-dir nbs

weights: $(STAMP) ## Train again what ditnano/weights/ ships (hours on two cores): make weights WEIGHTS="name ..."
	@test -n "$(strip $(WEIGHTS))" || { echo 'weights: name them, e.g. make weights WEIGHTS="digitsnet digits32"' >&2; exit 2; }
	@set -e; for name in $(WEIGHTS); do echo "ditnano build $$name"; $(BIN)/ditnano build $$name; done

docs: $(STAMP) ## The website into _docs/, from the notebooks as they are stored; a broken link is an error
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' \
	  $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info>=(3,11) else "")')
	$(BIN)/python docs/prepare.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file _proc/mkdocs.yml
	@echo "docs: in _docs/; to read them with search: python -m http.server --directory _docs"

dist: $(STAMP) ## Wheel and source archive into dist/
	$(BIN)/python -m build --outdir dist .

hooks: $(STAMP) ## Git: merge notebooks cell by cell, check before a commit
	@git config --local core.hooksPath .githooks
	@git config --local merge.nbdev-merge.name "merge notebooks cell by cell"
	@git config --local merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"
	@echo "hooks: installed for this clone (git config --local --unset core.hooksPath takes them out)"

precommit: $(STAMP)
	@$(MAKE) -s check

trust: $(STAMP)
	@$(BIN)/nbdev_trust
