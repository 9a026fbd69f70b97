package fakes

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"github.com/holdfast-backup/holdfast/hypervisor"
)

// pageSize is the unit in which disks are stored and shared, in bytes.
const pageSize = 64 << 10

// owner tells which image may write a page in place. Pages with another owner
// are shared with a frozen image and are copied first.
type owner struct{ _ byte }

type page struct {
	own  *owner
	data []byte // pageSize bytes
}

// image is a sparse disk. Missing pages read as zeros. It is not safe for
// concurrent use, except that a frozen image, which nobody writes, may be read
// by many.
type image struct {
	size  int64
	own   *owner
	pages map[int64]*page
}

func newImage(size int64) *image {
	return &image{size: size, own: &owner{}, pages: map[int64]*page{}}
}

// freeze returns a copy that shares all pages. Both copy before they write.
func (m *image) freeze() *image {
	m.own = &owner{}
	pages := make(map[int64]*page, len(m.pages))
	for i, p := range m.pages {
		pages[i] = p
	}
	return &image{size: m.size, own: &owner{}, pages: pages}
}

// check refuses a range that is not inside the disk.
func (m *image) check(off, n int64) error {
	if off < 0 || n < 0 || off > m.size || n > m.size-off {
		return fmt.Errorf("range [%d,+%d) is outside a disk of %d bytes", off, n, m.size)
	}
	return nil
}

// readAt behaves as io.ReaderAt.
func (m *image) readAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("negative offset %d", off)
	}
	if off >= m.size {
		return 0, io.EOF
	}
	var eof error
	if rest := m.size - off; int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	for n := 0; n < len(p); {
		at := (off + int64(n)) % pageSize
		chunk := p[n:min(len(p), n+int(pageSize-at))]
		if pg := m.pages[(off+int64(n))/pageSize]; pg != nil {
			copy(chunk, pg.data[at:])
		} else {
			clear(chunk)
		}
		n += len(chunk)
	}
	return len(p), eof
}

// writable returns the page with this index, made or copied if need be.
func (m *image) writable(i int64) *page {
	pg := m.pages[i]
	switch {
	case pg == nil:
		pg = &page{own: m.own, data: make([]byte, pageSize)}
	case pg.own != m.own:
		pg = &page{own: m.own, data: slices.Clone(pg.data)}
	default:
		return pg
	}
	m.pages[i] = pg
	return pg
}

// write stores p at off. The range must have been checked.
func (m *image) write(p []byte, off int64) {
	for len(p) > 0 {
		n := copy(m.writable(off / pageSize).data[off%pageSize:], p)
		p, off = p[n:], off+int64(n)
	}
}

// zero makes a range read as zeros; with discard, whole pages are given back.
// It returns the parts that could have held anything else before, ascending.
func (m *image) zero(off, n int64, discard bool) []hypervisor.Extent {
	var touched []hypervisor.Extent
	for _, i := range m.pagesIn(off, n) {
		from := max(off, i*pageSize)
		to := min(off+n, (i+1)*pageSize)
		touched = appendExtent(touched, hypervisor.Extent{Offset: from, Length: to - from})
		if discard && from == i*pageSize && (to == (i+1)*pageSize || to == m.size) {
			delete(m.pages, i)
			continue
		}
		clear(m.writable(i).data[from-i*pageSize : to-i*pageSize])
	}
	return touched
}

// resize changes the size. What is cut off is gone: growing again shows zeros.
func (m *image) resize(size int64) {
	if size < m.size {
		m.zero(size, m.size-size, true)
	}
	m.size = size
}

// pagesIn returns, ascending, the indexes of the pages that exist in a range.
func (m *image) pagesIn(off, n int64) []int64 {
	if n <= 0 {
		return nil
	}
	first, last := off/pageSize, (off+n-1)/pageSize
	var out []int64
	if last-first < int64(len(m.pages)) {
		for i := first; i <= last; i++ {
			if m.pages[i] != nil {
				out = append(out, i)
			}
		}
		return out
	}
	for i := range m.pages {
		if i >= first && i <= last {
			out = append(out, i)
		}
	}
	slices.SortFunc(out, cmp.Compare)
	return out
}

// allocated returns the extents that may hold data.
func (m *image) allocated() []hypervisor.Extent {
	var out []hypervisor.Extent
	for _, i := range m.pagesIn(0, m.size) {
		end := min(m.size, (i+1)*pageSize)
		out = appendExtent(out, hypervisor.Extent{Offset: i * pageSize, Length: end - i*pageSize})
	}
	return out
}

// hole reports whether a range has no page at all.
func (m *image) hole(off, n int64) bool {
	for i := off / pageSize; i*pageSize < off+n; i++ {
		if m.pages[i] != nil {
			return false
		}
	}
	return true
}

// split divides an extent where allocated space begins or ends, and marks the
// parts that are known to be zeros.
func (m *image) split(e hypervisor.Extent) []hypervisor.Extent {
	var out []hypervisor.Extent
	at := e.Offset
	for _, i := range m.pagesIn(e.Offset, e.Length) {
		from, to := max(e.Offset, i*pageSize), min(e.End(), (i+1)*pageSize)
		if from > at {
			out = appendExtent(out, hypervisor.Extent{Offset: at, Length: from - at, Zero: true})
		}
		out = appendExtent(out, hypervisor.Extent{Offset: from, Length: to - from})
		at = to
	}
	if at < e.End() {
		out = appendExtent(out, hypervisor.Extent{Offset: at, Length: e.End() - at, Zero: true})
	}
	return out
}

// appendExtent appends e, joined to the last extent when they touch and agree.
func appendExtent(list []hypervisor.Extent, e hypervisor.Extent) []hypervisor.Extent {
	if n := len(list); n > 0 && list[n-1].End() == e.Offset && list[n-1].Zero == e.Zero {
		list[n-1].Length += e.Length
		return list
	}
	return append(list, e)
}
