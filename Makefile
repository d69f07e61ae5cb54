.DEFAULT_GOAL := help
.PHONY: help demo serve loadtest test check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## Install what is needed and show a whole deployment at work
	scripts/install
	scripts/demo

serve: ## Start configs/default.yaml on ports 8000 (HTTP), 8001 (gRPC) and 8002 (metrics)
	scripts/serve

loadtest: ## Put a minute of load on a deployment of its own and write a report about it
	scripts/loadtest --streams 4 --period 10 --length-scale 0.25 --duration 45

test: ## Run all tests
	scripts/install --dev
	scripts/test

check: ## Check style, format, types and the arrows between packages
	scripts/check

clean: ## Remove .venv and all caches; the weights in ~/.cache/baton stay
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
