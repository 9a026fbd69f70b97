package archtest

// module is the path of the module under test.
const module = "github.com/holdfast-backup/holdfast"

// rule forbids dependencies, direct or not. Test files are free.
type rule struct {
	// of are the packages that the rule is about: paths inside the module, or with
	// "/..." also those below. "..." is all of them.
	of []string
	// but are packages that "of" does not mean.
	but []string
	// never are packages that none of them may depend on: written like of, if they
	// are in the module; else paths or prefixes of paths of other modules. "*"
	// means every package that is not of the standard library, but for those in
	// only.
	never []string
	// only are exceptions from never.
	only []string
	// direct narrows the rule to packages that are imported directly.
	direct bool
	why    string
}

// planned are packages that the rules name and that may not be there yet. All
// others must be: a rule about a package that was renamed protects nothing.
var planned = map[string]bool{
	"replication": true, "recovery": true, "guestfs": true,
	"drivers/vmware": true, "drivers/xen": true, "drivers/hyperv": true,
	"fakes/vspheresim": true, "fakes/xapisim": true, "fakes/hypervsim": true,
	"image/vmdk": true, "image/vhd": true, "image/vhdx": true,
	"examples": true,
}

// sdks are modules that only the package made for them may pull in.
var sdks = []string{
	"github.com/vmware/govmomi", "github.com/kopia/kopia", "github.com/microsoft/wmi",
	"libvirt.org/go/libvirt", "libvirt.org/go/libvirtxml", "github.com/digitalocean/go-libvirt",
	"github.com/masterzen/winrm", "github.com/hirochachacha/go-smb2",
}

var (
	pipelines = []string{"backup/...", "restore/...", "replication/...", "recovery/..."}
	engines   = []string{"repository/kopiarepo/..."}
	drivers   = []string{"drivers/..."}
	sims      = []string{"fakes/vspheresim/...", "fakes/xapisim/...", "fakes/hypervsim/..."}
	command   = []string{"github.com/spf13/cobra", "github.com/vbauerster/mpb"}
	contracts = []string{"hypervisor", "repository"}
	testify   = []string{"github.com/stretchr/testify"}
)

func rules() []rule {
	return []rule{
		{
			of: contracts, never: []string{"*"},
			why: "naming an interface must not cost an SDK, and neither contract knows the other",
		},
		{
			of: []string{"image/..."}, never: []string{"*"},
			only: []string{"image/...", "internal/extent", "internal/directio"},
			why:  "disk image formats stand alone, so that simulators and drivers can share them",
		},
		{
			of: []string{"repository/retention"}, never: []string{"*"}, only: []string{"repository"},
			why: "retention is a pure function of the contract",
		},
		{
			of: pipelines, never: join(sdks, drivers, engines, sims, []string{"fakes"}),
			why: "callers link only what they use: pipelines know contracts alone",
		},
		{
			of: []string{"nbd"}, never: join(sdks, drivers, engines, contracts, pipelines, []string{"fakes/..."}),
			why: "the protocol knows nothing of VMs",
		},
		{
			of: []string{"backup/..."}, never: []string{"restore/...", "replication/...", "recovery/..."},
			why: "recovery stands on replication, that on backup and restore, never the other way round",
		},
		{
			of: []string{"restore/..."}, never: []string{"backup/...", "replication/...", "recovery/..."},
			why: "recovery stands on replication, that on backup and restore, never the other way round",
		},
		{
			of: []string{"replication/..."}, never: []string{"recovery/..."},
			why: "recovery stands on replication",
		},
		{
			of: drivers, never: join(pipelines, []string{"repository/...", "fakes/..."}),
			why: "drivers are leaves: they read and write a hypervisor and know no store",
		},
		{
			of: []string{"drivers/kvm/..."}, never: []string{"drivers/vmware/...", "drivers/xen/...", "drivers/hyperv/..."},
			why: "drivers do not know each other",
		},
		{
			of: []string{"drivers/vmware/..."}, never: []string{"drivers/kvm/...", "drivers/xen/...", "drivers/hyperv/..."},
			why: "drivers do not know each other",
		},
		{
			of: []string{"drivers/xen/..."}, never: []string{"drivers/kvm/...", "drivers/vmware/...", "drivers/hyperv/..."},
			why: "drivers do not know each other",
		},
		{
			of: []string{"drivers/hyperv/..."}, never: []string{"drivers/kvm/...", "drivers/vmware/...", "drivers/xen/..."},
			why: "drivers do not know each other",
		},
		{
			of: []string{"fakes"}, never: join(sdks, sims, drivers, pipelines, engines, testify),
			why: "fakes are usable in anyone's tests for free",
		},
		{
			of: sims, never: drivers,
			why: "a simulator that shares code with the driver agrees with its bugs",
		},
		{
			of: []string{"hypervisor/hypervisortest", "repository/repositorytest"}, never: join(sdks, drivers, engines, pipelines),
			why: "a stranger's driver or engine runs the suite without linking ours",
		},
		{
			of: engines, never: join(drivers, pipelines, []string{"hypervisor", "nbd", "fakes/..."}),
			why: "a repository stores byte ranges and documents, not VMs",
		},
		{
			of: []string{"internal/..."}, but: []string{"internal/archtest"},
			never: join(sdks, drivers, pipelines, engines),
			why:   "shared mechanics stand below what shares them",
		},
		{
			of: []string{"..."}, but: []string{"repository/kopiarepo/...", "cmd/...", "lab/..."},
			never: []string{"github.com/kopia/kopia"},
			why:   "kopia has no stable API: every call of it is in one package",
		},
		{
			of: []string{"..."}, but: []string{"cmd/..."}, never: command,
			why: "the command line is the command's",
		},
		{
			of: []string{"..."}, but: []string{"hypervisor/hypervisortest", "repository/repositorytest"},
			never: testify, direct: true,
			why: "shipped code does not link test helpers, but for the public suites",
		},
	}
}

// oneDriver are the packages that may link more than one driver.
var oneDriver = []string{"cmd/...", "examples/..."}

func join(lists ...[]string) (out []string) {
	for _, l := range lists {
		out = append(out, l...)
	}
	return out
}
