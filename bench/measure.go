//go:build linux

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// sample is one run of one contender.
type sample struct {
	wall, cpu time.Duration // cpu: user and system of the process tree
	rss       int64         // of the largest process, bytes
	stored    int64         // bytes below the output directory
}

// command runs a shell line and measures the tree of processes that it waits for.
func command(line string, env ...string) (sample, error) {
	cmd := exec.Command("bash", "-c", "set -o pipefail; "+line)
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begin := time.Now()
	err := cmd.Run()
	s := sample{wall: time.Since(begin)}
	if st := cmd.ProcessState; st != nil {
		s.cpu = st.UserTime() + st.SystemTime()
		if ru, ok := st.SysUsage().(*syscall.Rusage); ok {
			s.rss = ru.Maxrss << 10
		}
	}
	if err != nil {
		return s, fmt.Errorf("%s: %w\n%s", line, err, out.Bytes())
	}
	return s, nil
}

// size adds up what files below dir take, in bytes of content.
func size(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil
		}
		if fi, err := d.Info(); err == nil {
			n += fi.Size()
		}
		return nil
	})
	return n
}

func median[T cmp.Ordered](v []T) T {
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

func middle(v []sample) sample {
	pick := func(f func(sample) int64) int64 {
		var x []int64
		for _, s := range v {
			x = append(x, f(s))
		}
		return median(x)
	}
	return sample{
		wall:   time.Duration(pick(func(s sample) int64 { return int64(s.wall) })),
		cpu:    time.Duration(pick(func(s sample) int64 { return int64(s.cpu) })),
		rss:    pick(func(s sample) int64 { return s.rss }),
		stored: pick(func(s sample) int64 { return s.stored }),
	}
}
