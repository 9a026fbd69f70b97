package lease

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
)

func isFenced(err error) bool { return errors.Is(err, repository.ErrFenced) }

// Holder describes this process for others: host, boot, process and its start,
// and the run. Its text is what Dead takes apart.
func Holder(run string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	pid := os.Getpid()
	return fmt.Sprintf("host=%s boot=%s pid=%d start=%s run=%s", host, bootID(), pid, startOf(pid), run)
}

// Dead reports whether holder is known to be dead: it was a process of this host
// and boot that has ended, or of an earlier boot of this host. False means alive
// or unknown.
func Dead(holder string) bool {
	f := map[string]string{}
	for w := range strings.FieldsSeq(holder) {
		if k, v, ok := strings.Cut(w, "="); ok {
			f[k] = v
		}
	}
	host, err := os.Hostname()
	if err != nil || f["host"] != host || f["boot"] == "" || f["pid"] == "" || bootID() == "" {
		return false
	}
	if f["boot"] != bootID() {
		return true
	}
	var pid int
	if _, err := fmt.Sscanf(f["pid"], "%d", &pid); err != nil || pid <= 0 {
		return false
	}
	if f["start"] == "" {
		return false
	}
	now := startOf(pid)
	return now != "" && now != f["start"]
}
