package backup

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
)

// AuditRate says how much of a disk an incremental reads again to audit the
// hypervisor's change tracking: leaves of repository.LeafSize bytes, drawn at
// random from those that it calls unchanged, are compared with the digests of the
// parent. The zero value is the default: at most 115 MiB and at most 5 % of each
// disk, so that a disk of less than 5 MiB is not audited.
//
// 460 leaves, which are 115 MiB, find a tracker that hides one change in a
// hundred with a probability of 99 % in each run.
type AuditRate struct {
	Off   bool
	Share float64 // of each disk, up to 1 for all of it; zero: no limit by share
	Bytes int64   // of each disk; zero: no limit by bytes
}

// The default of AuditRate.
const (
	defaultAuditBytes = 115 << 20
	defaultAuditParts = 20 // a disk is this many times what is read of it at most
)

const auditForms = "use a share such as 5%, a size such as 115MiB, all, off or auto"

// ParseAuditRate reads "auto", "off", "all", a share of each disk such as "5%" or
// "0.5%", or a size such as "115MiB", with the units B, KiB, MiB, GiB and TiB or
// their first letters.
func ParseAuditRate(s string) (AuditRate, error) {
	bad := func(why string) (AuditRate, error) {
		return AuditRate{}, fmt.Errorf("%q is not an audit rate%s: %s", s, why, auditForms)
	}
	text := strings.ToLower(strings.TrimSpace(s))
	switch text {
	case "auto":
		return AuditRate{}, nil
	case "off":
		return AuditRate{Off: true}, nil
	case "all":
		return AuditRate{Share: 1}, nil
	}
	if number, ok := strings.CutSuffix(text, "%"); ok {
		v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		switch {
		case err != nil || math.IsNaN(v):
			return bad("")
		case v < 0 || v > 100:
			return bad(", which is from 0% to 100%")
		case v == 0:
			return AuditRate{Off: true}, nil
		}
		return AuditRate{Share: v / 100}, nil
	}
	digits := strings.TrimRight(text, "abcdefghijklmnopqrstuvwxyz ")
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 {
		return bad("")
	}
	unit := strings.TrimSpace(text[len(digits):])
	shift, ok := map[string]int{
		"b": 0, "k": 10, "kib": 10, "m": 20, "mib": 20, "g": 30, "gib": 30, "t": 40, "tib": 40,
	}[unit]
	switch {
	case n == 0 && (ok || unit == ""):
		return AuditRate{Off: true}, nil
	case !ok:
		return bad("")
	case n > math.MaxInt64>>shift:
		return bad(", which is below 8 EiB")
	}
	return AuditRate{Bytes: n << shift}, nil
}

// String returns a form that ParseAuditRate takes; a rate with both limits has
// none, and is shown with both.
func (a AuditRate) String() string {
	share := strconv.FormatFloat(a.Share*100, 'g', -1, 64) + "%"
	switch {
	case a.Off:
		return "off"
	case a == AuditRate{}:
		return "auto"
	case a.Share == 1 && a.Bytes == 0:
		return "all"
	case a.Bytes == 0:
		return share
	}
	size := strconv.FormatInt(a.Bytes, 10) + "B"
	for _, u := range []struct {
		shift int
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if a.Bytes&(1<<u.shift-1) == 0 {
			size = strconv.FormatInt(a.Bytes>>u.shift, 10) + u.name
			break
		}
	}
	if a.Share == 0 {
		return size
	}
	return share + ", at most " + size
}

func (a AuditRate) check() error {
	if math.IsNaN(a.Share) || a.Share < 0 || a.Share > 1 || a.Bytes < 0 {
		return fmt.Errorf("audit rate of %v of each disk and %d bytes is not valid", a.Share, a.Bytes)
	}
	return nil
}

// leaves returns how many leaves of a disk of size bytes are drawn at most. The
// default never exceeds its limits; a rate that was asked for draws one leaf at
// least.
func (a AuditRate) leaves(size int64) int64 {
	if a.Off || size <= 0 {
		return 0
	}
	if a == (AuditRate{}) {
		return min(defaultAuditBytes, size/defaultAuditParts) / repository.LeafSize
	}
	n := size
	if a.Share > 0 && a.Share < 1 {
		n = min(size, int64(float64(size)*a.Share))
	}
	if a.Bytes > 0 {
		n = min(n, a.Bytes)
	}
	if n == size {
		return (size-1)/repository.LeafSize + 1
	}
	return max(1, n/repository.LeafSize)
}
