//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// options are the command line.
type options struct {
	rounds   int
	holdfast string // the command
	kopia    string // the peer
	out      string // the page to write; empty: standard output alone
	quick    bool   // a quarter of the data, one round: to see that everything runs
	phase    string // the one phase to run; empty: all
	match    *regexp.Regexp
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 3, "interleaved runs of each contender")
	flag.StringVar(&o.holdfast, "holdfast", "bin/holdfast", "the command under test")
	flag.StringVar(&o.kopia, "kopia", "tools/bin/kopia", "the kopia program")
	flag.StringVar(&o.out, "out", "", "page to write")
	flag.BoolVar(&o.quick, "quick", false, "a quarter of the data, one round")
	flag.StringVar(&o.phase, "phase", "", "run only this phase: full, read, incremental, restore or memory; writes no page")
	match := flag.String("match", "", "run only contenders whose name matches this regular expression")
	reader := flag.String("read", "", "only read the first disk of this domain to nowhere (a contender of its own)")
	flag.Parse()
	var err error
	if o.match, err = regexp.Compile(*match); err != nil {
		fmt.Fprintln(os.Stderr, "bench: -match:", err)
		os.Exit(2)
	}
	if *reader != "" {
		err = readOnly(context.Background(), *reader)
	} else {
		err = bench(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// contender is something that is measured.
type contender struct {
	name string
	run  func(dir string) (sample, error)
}

// bench runs everything and writes the page.
func bench(o options) (err error) {
	for _, p := range []*string{&o.holdfast, &o.kopia} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
		if _, err := os.Stat(*p); err != nil {
			return fmt.Errorf("%w (make build kopia)", err)
		}
	}
	data := gib
	if o.quick {
		data, o.rounds = gib/4, 1
	}
	dir, err := os.MkdirTemp("/var/tmp", "hf-bench")
	if err != nil {
		return err
	}
	l := &lab{dir: dir}
	defer l.close()
	img, err := l.disk("main", 4*data, func(f *os.File) error {
		return errors.Join(fill(0, data, 1, random)(f), fill(2*data, data, 2, text)(f))
	})
	if err != nil {
		return err
	}
	dom, err := l.domain("main", img)
	if err != nil {
		return err
	}
	// virtnbdbackup refuses a domain with checkpoints of others, so its chain gets
	// a domain of its own, with the same bytes.
	twin := filepath.Join(dir, "twin.qcow2")
	if _, err := sh("qemu-img", "convert", "-q", "-U", "-O", "qcow2", img, twin); err != nil {
		return err
	}
	r := &runner{o: o, l: l, dom: dom, data: data, got: map[string][]sample{}}
	if r.twin, err = l.domain("twin", twin); err != nil {
		return err
	}
	for _, phase := range []struct {
		name string
		run  func() error
	}{{"full", r.full}, {"read", r.read}, {"incremental", r.incremental}, {"restore", r.restore}, {"memory", r.memory}} {
		if o.phase != "" && o.phase != phase.name && (o.phase != "restore" || phase.name != "incremental") {
			continue // a restore is of what the incremental phase made
		}
		if err := phase.run(); err != nil {
			return err
		}
	}
	if o.phase != "" {
		return nil
	}
	page := r.page()
	fmt.Print(page)
	if o.out == "" {
		return nil
	}
	return os.WriteFile(o.out, []byte(page), 0o644)
}

type runner struct {
	o     options
	l     *lab
	dom   string
	twin  string // the same bytes in another domain
	data  int64
	got   map[string][]sample
	order []string
}

func (r *runner) add(name string, s sample) {
	if r.got[name] == nil {
		r.order = append(r.order, name)
	}
	r.got[name] = append(r.got[name], s)
	fmt.Fprintf(os.Stderr, "%-28s %6.2f s wall %6.2f s CPU %5d MiB RSS %6d MiB stored\n", name, s.wall.Seconds(), s.cpu.Seconds(), s.rss>>20, s.stored>>20)
}

// turns runs contenders in turn, so that a drift of the machine hits all.
func (r *runner) turns(cs []contender) error {
	for i := range r.o.rounds {
		for _, c := range cs {
			if !r.o.match.MatchString(c.name) {
				continue
			}
			dir := filepath.Join(r.l.dir, fmt.Sprintf("out-%d", i))
			s, err := c.run(dir)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if s.stored == 0 {
				s.stored = size(dir)
			}
			r.add(c.name, s)
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

var secret = []string{"HOLDFAST_REPO_PASSWORD=bench", "RESTIC_PASSWORD=bench", "BORG_PASSPHRASE=bench", "KOPIA_PASSWORD=bench", "KOPIA_CHECK_FOR_UPDATES=false"}

func (r *runner) env(dir string) []string {
	return append([]string{"HOME=" + dir + "-home", "HOLDFAST_STATE_DIR=" + dir + "-home/state"}, secret...)
}

func (r *runner) sh(dir, line string) (sample, error) {
	if err := os.MkdirAll(dir+"-home", 0o700); err != nil {
		return sample{}, err
	}
	return command(line, r.env(dir)...)
}

func (r *runner) holdfastBackup(dir, dom string) string {
	return fmt.Sprintf("%s backup --from %s --repo %s --scratch-dir %s %s", r.o.holdfast, uri, dir, r.l.dir, dom)
}

func (r *runner) virtnbdbackup(dir, level, flags string) string {
	return fmt.Sprintf("virtnbdbackup -U %s -d %s -l %s %s --scratchdir %s -o %s", uri, r.twin, level, flags, r.l.dir, dir)
}

// dropped removes the checkpoints of a domain between runs.
func dropped(dom string) error {
	out, err := virsh("checkpoint-list", "--name", dom)
	if err != nil {
		return err
	}
	for n := range strings.FieldsSeq(out) {
		if _, err := virsh("checkpoint-delete", dom, n); err != nil {
			return err
		}
	}
	return nil
}

// full is a first backup into an empty repository.
func (r *runner) full() error {
	peer := func(name, line string) contender {
		return contender{name: name, run: func(dir string) (s sample, err error) {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return s, err
			}
			err = r.l.export(r.dom, func(url string) (err error) {
				s, err = r.sh(dir, strings.NewReplacer("URL", "'"+url+"'", "DIR", dir, "KOPIA", r.o.kopia).Replace(line))
				return err
			})
			return s, err
		}}
	}
	vnb := func(name, flags string) contender {
		return contender{name: name, run: func(dir string) (sample, error) {
			s, err := r.sh(dir, r.virtnbdbackup(dir, "full", flags))
			return s, errors.Join(err, dropped(r.twin))
		}}
	}
	return r.turns([]contender{
		{name: "holdfast", run: func(dir string) (sample, error) {
			s, err := r.sh(dir, r.holdfastBackup(dir, r.dom))
			return s, errors.Join(err, dropped(r.dom))
		}},
		vnb("virtnbdbackup", ""),
		vnb("virtnbdbackup lz4", "-z"),
		peer("restic", "restic -q init -r DIR --no-cache && nbdcopy URL - | restic -q -r DIR --no-cache backup --stdin"),
		peer("borg", "borg init -e repokey-blake2 DIR && nbdcopy URL - | borg create DIR::a -"),
		peer("kopia program", "KOPIA --config-file DIR-home/k repository create filesystem --path DIR >/dev/null 2>&1 && nbdcopy URL - | KOPIA --config-file DIR-home/k snapshot create --no-progress --stdin-file disk --compression zstd-fastest /d 2>/dev/null || { KOPIA --config-file DIR-home/k policy set --global --compression zstd-fastest >/dev/null && nbdcopy URL - | KOPIA --config-file DIR-home/k snapshot create --no-progress --stdin-file disk /d; }"),
		peer("qemu-img convert -c", "qemu-img convert -c -O qcow2 URL DIR/d.qcow2"),
	})
}

// read is the reading path alone.
func (r *runner) read() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return r.turns([]contender{
		{name: "holdfast, reading alone", run: func(dir string) (sample, error) {
			return r.sh(dir, fmt.Sprintf("%s -read %s", self, r.dom))
		}},
		{name: "nbdcopy to null", run: func(dir string) (s sample, err error) {
			err = r.l.export(r.dom, func(url string) (err error) {
				s, err = r.sh(dir, "nbdcopy '"+url+"' null:")
				return err
			})
			return s, err
		}},
	})
}

// incremental has one chain for each of the two, and the same bytes changed.
func (r *runner) incremental() error {
	ours, theirs := filepath.Join(r.l.dir, "chain-ours"), filepath.Join(r.l.dir, "chain-theirs")
	if _, err := r.sh(ours, r.holdfastBackup(ours, r.dom)); err != nil {
		return err
	}
	if _, err := r.sh(theirs, r.virtnbdbackup(theirs, "full", "")); err != nil {
		return err
	}
	for i := range r.o.rounds {
		for k := range int64(16) { // 256 MiB in 16 places
			for _, dom := range []string{r.dom, r.twin} {
				if err := monitorWrite(dom, 0, k*r.data/8+int64(i)*mib, r.data/64, 1+(i*16+int(k))%250); err != nil {
					return err
				}
			}
		}
		for _, c := range []struct{ name, dir, line string }{
			{"holdfast, incremental", ours, r.holdfastBackup(ours, r.dom)},
			{"virtnbdbackup, incremental", theirs, r.virtnbdbackup(theirs, "inc", "")},
			{"holdfast, unchanged", ours, r.holdfastBackup(ours, r.dom)},
		} {
			before := size(c.dir)
			s, err := r.sh(c.dir, c.line)
			if err != nil {
				return err
			}
			s.stored = size(c.dir) - before
			r.add(c.name, s)
		}
	}
	return nil
}

// restore brings back the chains of the phase before.
func (r *runner) restore() error {
	ours, theirs := filepath.Join(r.l.dir, "chain-ours"), filepath.Join(r.l.dir, "chain-theirs")
	err := r.turns([]contender{
		{name: "holdfast, restore to raw", run: func(dir string) (sample, error) {
			return r.sh(ours, fmt.Sprintf("%s restore --repo %s --vm %s --point latest --to 'file:%s?format=raw'", r.o.holdfast, ours, r.dom, dir))
		}},
		{name: "virtnbdrestore", run: func(dir string) (sample, error) {
			return r.sh(theirs, fmt.Sprintf("mkdir -p %[2]s && virtnbdrestore -i %[1]s -o %[2]s", theirs, dir))
		}},
	})
	return errors.Join(err, dropped(r.dom), dropped(r.twin), os.RemoveAll(ours), os.RemoveAll(theirs))
}

// memory is the peak of the resident set in two hard cases.
func (r *runner) memory() error {
	var images []string
	for i := range int64(8) {
		img, err := r.l.disk(fmt.Sprintf("m%d", i), r.data/4, fill(0, r.data/4, 10+i, random))
		if err != nil {
			return err
		}
		images = append(images, img)
	}
	eight, err := r.l.domain("eight", images...)
	if err != nil {
		return err
	}
	places := int64(4096)
	if r.o.quick {
		places = 512
	}
	img, err := r.l.disk("sparse", 8<<40, func(f *os.File) error {
		for i := range places {
			if err := fill(i*(8<<40/places), mib, i, random)(f); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	sparse, err := r.l.domain("sparse", img)
	if err != nil {
		return err
	}
	return r.turns([]contender{
		{name: "holdfast, 8 disks", run: func(dir string) (sample, error) { return r.sh(dir, r.holdfastBackup(dir, eight)) }},
		{name: "holdfast, sparse 8 TiB", run: func(dir string) (sample, error) { return r.sh(dir, r.holdfastBackup(dir, sparse)) }},
	})
}

// version asks a peer who it is.
func version(name string, args ...string) string {
	out, err := sh(name, args...)
	if err != nil {
		return name + ": not found"
	}
	first, _, _ := strings.Cut(strings.TrimSpace(out), "\n")
	return first
}
