//go:build unix && !solaris && !aix

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// detach takes a child out of the session: signals of the terminal and of the
// process group do not reach it.
func detach(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }

// ignoreSignals makes the guard outlive everything but SIGKILL. A write to a
// parent that is dead is an error and not a signal.
func ignoreSignals() {
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGQUIT)
}

// tryLockFile locks a file until it is closed or the process ends; ErrBusy when
// somebody else holds it.
func tryLockFile(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = fmt.Errorf("%s: %w", name, hypervisor.ErrBusy)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
