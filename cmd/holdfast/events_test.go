package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/hypervisor"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

func TestProgressIsLimited(t *testing.T) {
	at := time.Unix(1000, 0)
	progress := func(disk string, done int64) event {
		at = at.Add(10 * time.Millisecond)
		size := int64(1000)
		return event{Event: eventProgress, Time: at, VM: "v", Disk: disk, Done: &done, Size: &size}
	}
	l := limiter{every: 200 * time.Millisecond}
	n := 0
	for i := range int64(100) { // a second
		if l.pass(progress("a", i)) {
			n++
		}
	}
	require.Equal(t, 5, n)
	require.True(t, l.pass(progress("b", 1)), "another disk has a limit of its own")
	require.True(t, l.pass(progress("a", 1000)), "the end always passes")
	require.False(t, l.pass(progress("a", 1000)), "once")

	slow := limiter{every: 10 * time.Second, patient: true}
	require.False(t, slow.pass(progress("a", 1)))
	require.False(t, slow.pass(progress("a", 1000)), "what was quick needs no line")
}

// A terminal gets bars, which end with the work, whatever its outcome.
func TestBars(t *testing.T) {
	for _, failure := range []bool{false, true} {
		r := newRig(t, fakes.Options{})
		r.addVM(fakes.VMConfig{Name: "web1"})
		if failure {
			r.wrap = func(h hypervisor.Hypervisor) hypervisor.Hypervisor {
				return fakes.WithFaults(h, fakes.InjectorFunc(func(c fakes.Call) fakes.Fault {
					if c.Op == fakes.OpReadAt || c.Op == fakes.OpReadHole {
						return fakes.Fault{Err: errTest}
					}
					return fakes.Fault{}
				}))
			}
		}
		var out, errs bytes.Buffer
		p := &program{
			stdout: &out, stderr: &errs, env: func(k string) string { return r.env[k] },
			terminal: func(any) bool { return true }, connect: r, clock: clock.Real(),
		}
		code := p.run(t.Context(), []string{"backup", "--from", testURL, "--repo", r.repo(), "web1"})
		if failure {
			require.Equal(t, exitFailed, code)
			require.Contains(t, errs.String(), "error: web1: ")
			continue
		}
		require.Equal(t, exitOK, code, errs.String())
		require.Contains(t, out.String(), "web1: success")
	}
}
