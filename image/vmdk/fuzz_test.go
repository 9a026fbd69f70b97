package vmdk

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

// typed says that an error is one of this package.
func typed(t *testing.T, err error) {
	var e *Error
	if err != nil && !errors.As(err, &e) {
		t.Fatalf("%T is no *Error: %v", err, err)
	}
}

func FuzzDecoder(f *testing.F) {
	for _, front := range []bool{false, true} {
		s := tinyStream(f, front)
		f.Add(s)
		f.Add(s[:len(s)-512])
	}
	f.Fuzz(tryStream)
}

// FuzzEdits changes a stream as a mutation of its bytes hardly ever would: whole sectors are moved,
// and fields get values that occur elsewhere.
func FuzzEdits(f *testing.F) {
	back, front := tinyStream(f, false), tinyStream(f, true)
	f.Add([]byte{0, 2, 3}, false)
	f.Add([]byte{1, 5, 0, 2, 6, 0}, true)
	f.Add([]byte{3, 2, 0, 16, 4, 7, 3, 9, 5, 2, 5, 1}, false)
	f.Fuzz(func(t *testing.T, ops []byte, first bool) {
		b := back
		if first {
			b = front
		}
		tryStream(t, editSectors(bytes.Clone(b), ops))
	})
}

// tryStream decodes b, and says that what the decoder accepts is the disk that its tables describe.
func tryStream(t *testing.T, b []byte) {
	d, err := NewDecoder(bytes.NewReader(b), &DecoderOptions{Workers: 1})
	typed(t, err)
	if err != nil {
		return
	}
	end := int64(0)
	disk := make([]byte, min(d.Size(), 1<<20))
	err = d.Decode(context.Background(), func(off int64, p []byte) error {
		if off < end || len(p) == 0 || off+int64(len(p)) > d.Size() {
			t.Fatalf("%d bytes at %d behind %d of %d", len(p), off, end, d.Size())
		}
		end = off + int64(len(p))
		if off < int64(len(disk)) {
			copy(disk[off:], p)
		}
		return nil
	})
	typed(t, err)
	if err != nil {
		return
	}
	if d.front == nil { // zeros behind the end are no part of the file
		b = bytes.TrimRight(b, "\x00")
		b = append(bytes.Clone(b), make([]byte, roundUp(int64(len(b)), sector)+sector-int64(len(b)))...)
	}
	o, err := Open(bytes.NewReader(b), int64(len(b)), nil)
	if err != nil {
		t.Fatalf("decoded, and cannot be opened: %v", err)
	}
	got := make([]byte, len(disk))
	if n, err := o.ReadAt(got, 0); n < len(got) || o.Size() != d.Size() {
		t.Fatalf("decoded, and read %d bytes of %d: %v", n, len(got), err)
	}
	same(t, disk, got, "decoded and read")
}

func FuzzOpen(f *testing.F) {
	f.Add(tinyStream(f, false))
	f.Add(tinyStream(f, true))
	f.Add(tinyCOWD())
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Open(bytes.NewReader(b), int64(len(b)), nil)
		typed(t, err)
		if err != nil {
			return
		}
		end, n := int64(-1), 0
		for e, err := range d.Extents() {
			typed(t, err)
			if err != nil {
				break
			}
			if e.Offset < end || e.Length <= 0 || e.Offset+e.Length > d.Size() {
				t.Fatalf("extent %+v behind %d of %d", e, end, d.Size())
			}
			end = e.Offset + e.Length
			if n++; n > 1000 {
				break
			}
		}
		p := make([]byte, 1+len(b)*7%(200<<10))
		if _, err := d.ReadAt(p, 0); err != nil && d.Size() >= int64(len(p)) {
			typed(t, err)
		}
	})
}

func FuzzDescriptor(f *testing.F) {
	f.Add([]byte("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 63 VMFS \"a.vmdk\" 0\nddb.x = \"y\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDescriptor(b)
		typed(t, err)
		if err != nil {
			return
		}
		if n := d.Size(); n < 0 || n > MaxSize {
			t.Fatalf("%d bytes", n)
		}
		text, err := d.Marshal()
		if err != nil { // what cannot be expressed
			typed(t, err)
			return
		}
		again, err := ParseDescriptor(text)
		if err != nil {
			t.Fatalf("what was read cannot be read again: %v\n%q", err, text)
		}
		second, err := again.Marshal()
		if err != nil || !bytes.Equal(text, second) {
			t.Fatalf("%q became %q, %v", text, second, err)
		}
		if again.Size() != d.Size() || len(again.DDB) != len(d.DDB) || again.CID != d.CID || again.ParentCID != d.ParentCID {
			t.Fatalf("%+v became %+v", d, again)
		}
	})
}
