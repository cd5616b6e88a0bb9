package initrd

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
)

// BootModules orders the modules that init has to load so that want works. dep is
// the kernel's modules.dep, builtin its modules.builtin; want holds module names
// ("virtio_blk", with '-' and '_' alike). The result holds paths relative to the
// modules directory, dependencies first, without what is built into the kernel.
// A name that neither file knows is an error that names it.
func BootModules(dep io.Reader, want []string, builtin io.Reader) ([]string, error) {
	paths := map[string]string{}
	needs := map[string][]string{}
	err := eachLine(dep, func(line string) error {
		file, deps, ok := strings.Cut(line, ":")
		if !ok {
			return fmt.Errorf("malformed line %q", line)
		}
		name := moduleName(file)
		paths[name] = strings.TrimSpace(file)
		for _, d := range strings.Fields(deps) {
			needs[name] = append(needs[name], moduleName(d))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read modules.dep: %w", err)
	}
	builtins := map[string]bool{}
	err = eachLine(builtin, func(line string) error {
		builtins[moduleName(line)] = true
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read modules.builtin: %w", err)
	}

	var order []string
	done := map[string]bool{}
	under := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		if done[name] || builtins[name] {
			return nil
		}
		if paths[name] == "" {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		if under[name] {
			return fmt.Errorf("module %s depends on itself", name)
		}
		under[name] = true
		for _, d := range needs[name] {
			if err := visit(d); err != nil {
				return err
			}
		}
		done[name] = true
		order = append(order, paths[name])
		return nil
	}
	for _, name := range want {
		if err := visit(moduleName(name)); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func eachLine(r io.Reader, fn func(line string) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if line == "" {
			continue
		}
		if err := fn(line); err != nil {
			return err
		}
	}
	return s.Err()
}

// moduleName makes "virtio_blk" of "kernel/drivers/block/virtio-blk.ko.zst", as
// the kernel and kmod name modules.
func moduleName(file string) string {
	name := path.Base(strings.TrimSpace(file))
	name, _, _ = strings.Cut(name, ".ko")
	return strings.ReplaceAll(name, "-", "_")
}
