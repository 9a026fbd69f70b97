//go:build !unix || solaris || aix

package main

import (
	"io"
	"os"
	"os/exec"
	"os/signal"
)

// detach does nothing here: the child shares the console of its parent, and
// ignores its interrupts.
func detach(*exec.Cmd) {}

func ignoreSignals() { signal.Ignore(os.Interrupt) }

// tryLockFile makes the file and locks nothing: two guards of one VM on one host
// are not kept apart here.
func tryLockFile(name string) (io.Closer, error) {
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
}
