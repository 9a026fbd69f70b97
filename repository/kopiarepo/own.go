package kopiarepo

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"
	"strconv"
	"strings"

	"github.com/holdfast-backup/holdfast/repository"
)

// Files of our own lie under two prefixes. Whatever is under the first has a copy
// under the second, written before it.
const (
	primary = "holdfast/"
	mirror  = "holdfast-2/"
)

const (
	maxOwnFile = 1 << 30 // bytes; bounds what a damaged directory can make us read
	numberLen  = 12
)

// ownFiles reads and writes files of our own.
type ownFiles struct {
	dir  *dirStore
	keys *keys
	rnd  io.Reader
}

// put replaces a file and its copy. The names are durable after dir.sync.
func (o *ownFiles) put(ctx context.Context, t fileType, name string, header any, body []byte) (sum, error) {
	b, err := o.keys.write(o.rnd, t, name, header, body)
	if err != nil {
		return sum{}, err
	}
	if err := o.dir.putBytes(ctx, mirror+name, b); err != nil {
		return sum{}, err
	}
	return sumOf(b), o.dir.putBytes(ctx, primary+name, b)
}

// candidate is one stored form of a file.
type candidate struct {
	prefix string
	sum    sum
	header []byte
	body   []byte
	err    error // why it cannot be used
	absent bool
}

// candidates reads the file and its copy.
func (o *ownFiles) candidates(ctx context.Context, t fileType, name string) ([2]candidate, error) {
	var out [2]candidate
	for i, prefix := range [...]string{primary, mirror} {
		c := &out[i]
		c.prefix = prefix
		b, err := o.dir.get(ctx, prefix+name, maxOwnFile)
		switch {
		case err == nil:
			c.sum = sumOf(b)
			c.header, c.body, c.err = o.keys.read(t, name, b)
		case ctx.Err() != nil:
			return out, ctx.Err()
		default:
			c.err, c.absent = err, errors.Is(err, fs.ErrNotExist)
		}
	}
	return out, nil
}

// errAbsent: neither the file nor its copy exists.
var errAbsent = errors.New("no such file")

// get reads a file or, if that is not authentic, its copy. newer picks when both
// are authentic and differ; nil: the file.
func (o *ownFiles) get(ctx context.Context, t fileType, name string, newer func(a, b *candidate) *candidate) (*candidate, error) {
	cs, err := o.candidates(ctx, t, name)
	if err != nil {
		return nil, err
	}
	a, b := &cs[0], &cs[1]
	switch {
	case a.err == nil && b.err == nil && newer != nil && a.sum != b.sum:
		return newer(a, b), nil
	case a.err == nil:
		return a, nil
	case b.err == nil:
		return b, nil
	case a.absent && b.absent:
		return nil, errAbsent
	}
	return nil, fmt.Errorf("%s: %w", name, errors.Join(a.err, b.err))
}

// remove deletes the copy first, so that a crash leaves the file.
func (o *ownFiles) remove(ctx context.Context, name string) error {
	if err := o.dir.remove(ctx, mirror+name); err != nil {
		return err
	}
	return o.dir.remove(ctx, primary+name)
}

func number(n int64) string { return fmt.Sprintf("%0*d", numberLen, n) }

func parseNumber(s string) (int64, bool) {
	if len(s) != numberLen {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n > 0 && s[0] != '+'
}

// createNumbered makes entry n of a numbered log. The copy's name holds the
// digest, so that two writers racing for a number do not spoil each other's copy.
// It fails with fs.ErrExist if the number is taken.
func (o *ownFiles) createNumbered(ctx context.Context, t fileType, dir string, n int64, header any, body []byte) (sum, error) {
	name := dir + "/" + number(n)
	b, err := o.keys.write(o.rnd, t, name, header, body)
	if err != nil {
		return sum{}, err
	}
	s := sumOf(b)
	if err := o.dir.putBytes(ctx, mirrorNumbered(dir, n, s), b); err != nil {
		return s, err
	}
	if err := o.dir.sync(ctx); err != nil {
		return s, err
	}
	err = o.dir.create(ctx, primary+name, b)
	if err == nil || errors.Is(err, fs.ErrExist) && !o.holds(ctx, primary+name, b) {
		return s, err
	}
	// The answer may have been lost after the effect. What is stored decides.
	switch stored, rerr := o.dir.get(context.WithoutCancel(ctx), primary+name, maxOwnFile); {
	case rerr == nil && bytes.Equal(stored, b):
		if serr := o.dir.sync(context.WithoutCancel(ctx)); serr != nil {
			return s, fmt.Errorf("%w: %w", repository.ErrOutcomeUnknown, errors.Join(err, serr))
		}
		return s, nil
	case errors.Is(rerr, fs.ErrNotExist):
		return s, err
	case rerr == nil:
		return s, fmt.Errorf("%w: %w", fs.ErrExist, err)
	default:
		return s, fmt.Errorf("%w: %w", repository.ErrOutcomeUnknown, errors.Join(err, rerr))
	}
}

func (o *ownFiles) holds(ctx context.Context, name string, want []byte) bool {
	b, err := o.dir.get(ctx, name, maxOwnFile)
	return err == nil && bytes.Equal(b, want)
}

func mirrorNumbered(dir string, n int64, s sum) string {
	return mirror + dir + "/" + number(n) + "-" + s.String()[:16]
}

// numbered lists the numbers under dir: where the file is, and the names of its
// copies.
type numbered struct {
	primary map[int64]bool
	mirror  map[int64][]string
}

func (o *ownFiles) listNumbered(ctx context.Context, dir string) (*numbered, error) {
	out := &numbered{primary: map[int64]bool{}, mirror: map[int64][]string{}}
	entries, err := o.dir.list(ctx, primary+dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if n, ok := parseNumber(e.Name()); ok {
			out.primary[n] = true
		}
	}
	if entries, err = o.dir.list(ctx, mirror+dir); err != nil {
		return nil, err
	}
	for _, e := range entries {
		digits, _, _ := strings.Cut(e.Name(), "-")
		if n, ok := parseNumber(digits); ok {
			out.mirror[n] = append(out.mirror[n], mirror+dir+"/"+e.Name())
		}
	}
	return out, nil
}

// numbers returns all numbers of which something is stored, ascending.
func (l *numbered) numbers() []int64 {
	var out []int64
	for n := range l.primary {
		out = append(out, n)
	}
	for n := range l.mirror {
		if !l.primary[n] {
			out = append(out, n)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i] < out[j] })
	return out
}

// readNumbered reads entry n and its copies; the file, if it is stored, first.
func (o *ownFiles) readNumbered(ctx context.Context, t fileType, dir string, n int64, l *numbered) ([]candidate, error) {
	names := []string{}
	if l.primary[n] {
		names = append(names, primary+dir+"/"+number(n))
	}
	names = append(names, l.mirror[n]...)
	var out []candidate
	for _, name := range names {
		c := candidate{prefix: primary}
		if strings.HasPrefix(name, mirror) {
			c.prefix = mirror
		}
		b, err := o.dir.get(ctx, name, maxOwnFile)
		switch {
		case err == nil:
			c.sum = sumOf(b)
			c.header, c.body, c.err = o.keys.read(t, dir+"/"+number(n), b)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		default:
			c.err, c.absent = err, errors.Is(err, fs.ErrNotExist)
		}
		out = append(out, c)
	}
	return out, nil
}

// removeNumbered deletes entry n and its copies.
func (o *ownFiles) removeNumbered(ctx context.Context, dir string, n int64, l *numbered) error {
	for _, name := range l.mirror[n] {
		if err := o.dir.remove(ctx, name); err != nil {
			return err
		}
	}
	return o.dir.remove(ctx, primary+dir+"/"+number(n))
}

func deflate(b []byte) []byte {
	var out bytes.Buffer
	w, _ := flate.NewWriter(&out, flate.BestSpeed) // the level is valid
	_, _ = w.Write(b)                              // into memory
	_ = w.Close()
	return out.Bytes()
}

// inflate undoes deflate, for at most limit bytes.
func inflate(b []byte, limit int64) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(b)), limit+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", repository.ErrDamaged, err)
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("%w: it holds more than %d bytes", repository.ErrDamaged, limit)
	}
	return out, nil
}
