package lease

import (
	"fmt"
	"os"
	"strings"
)

// bootID identifies this boot of this host.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// startOf returns the start time of a process in clock ticks since boot, "none"
// when there is no such process or it is a zombie, "" when that cannot be told. See proc(5), field 22 of
// stat; the second field may hold spaces and brackets.
func startOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if os.IsNotExist(err) {
		return "none"
	}
	if err != nil {
		return ""
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return ""
	}
	if f[0] == "Z" || f[0] == "X" {
		return "none"
	}
	return f[19]
}
