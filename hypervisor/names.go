package hypervisor

import (
	"fmt"
	"regexp"
	"strings"
)

// Name is the name of an object that Holdfast makes on a platform:
// holdfast-<repo8>-<run>-<kind>. It tells whose it is, so that two products,
// repositories or hosts on one VM never touch each other's objects, and it is
// found even when the call that made it was never answered.
type Name struct {
	Repo string // the first 8 hex digits of the repository's ID
	Run  string // run ID, [a-z0-9]{1,32}
	Kind string // "snap", "vm", ...: [a-z0-9]{1,16}
}

var nameRE = regexp.MustCompile(`^holdfast-([0-9a-f]{8})-([a-z0-9]{1,32})-([a-z0-9]{1,16})$`)

// String returns the owner name.
func (n Name) String() string { return "holdfast-" + n.Repo + "-" + n.Run + "-" + n.Kind }

// RepoPrefix returns the beginning that all names of one repository share.
func RepoPrefix(repo8 string) string { return "holdfast-" + repo8 + "-" }

// ParseName takes an owner name apart. It fails for everything that is not one:
// such objects are foreign.
func ParseName(s string) (Name, error) {
	m := nameRE.FindStringSubmatch(s)
	if m == nil {
		return Name{}, fmt.Errorf("%q is not a name that Holdfast gives", s)
	}
	return Name{Repo: m[1], Run: m[2], Kind: m[3]}, nil
}

// IsOurs reports whether s is a name that Holdfast gives.
func IsOurs(s string) bool { return nameRE.MatchString(s) }

var diskIDRE = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// ValidDiskID reports whether id is fit to be a file name and a key everywhere.
func ValidDiskID(id DiskID) bool {
	return diskIDRE.MatchString(string(id)) && !strings.HasPrefix(string(id), ".")
}
