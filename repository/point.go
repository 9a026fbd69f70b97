package repository

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// PointID identifies a restore point in its repository: [a-z0-9-]{1,64}.
type PointID string

// PointSpec begins a point.
type PointSpec struct {
	Chain  string  // identity of what is backed up: [a-z0-9._-]{1,128}
	Name   string  // what a person calls it
	Run    string  // run ID, unique per point: [a-z0-9]{1,32}
	Parent PointID // point to inherit from, of the same chain; empty: none
	Lock   Lock    // fences the commit; nil: not fenced
}

// DiskSpec begins a disk.
type DiskSpec struct {
	ID        string
	Size      int64 // bytes
	BlockSize int   // bytes, a power-of-two multiple of LeafSize; the parent's if Inherit
	// Inherit takes blocks that are not written from the parent's disk of the
	// same ID, which must have the same size and block size.
	Inherit bool
}

// CommitInfo completes a point.
type CommitInfo struct {
	Created time.Time         // the instant that the point shows
	Labels  map[string]string // small facts to list and filter by
	Meta    json.RawMessage   // opaque document, authenticated with the record
}

// Point is the record of a restore point.
type Point struct {
	ID       PointID
	Chain    string
	Name     string
	Run      string
	Sequence int64 // per chain, from 1, without gaps but for deleted points
	Parent   PointID
	Epoch    int64 // of the lock under which it was committed
	Created  time.Time
	Labels   map[string]string
	Meta     json.RawMessage
	Disks    []Disk
	Files    []File

	State  State
	Detail string // why State is not Committed
}

// Disk returns the disk with this ID, or nil.
func (p *Point) Disk(id string) *Disk {
	for i := range p.Disks {
		if p.Disks[i].ID == id {
			return &p.Disks[i]
		}
	}
	return nil
}

// State is what can be said of a listed point.
type State string

// States. A point that is not Committed cannot be opened.
const (
	Committed State = "committed"
	Vanished  State = "vanished"  // later records prove that it was committed, and it is gone
	Untrusted State = "untrusted" // its record is damaged, forged or rolled back
)

// Disk is a disk of a point.
type Disk struct {
	ID        string
	Size      int64
	BlockSize int
	Root      Digest // of the digest tree over plaintext
	Stats     DiskStats
}

// File is a small file of a point.
type File struct {
	Name string
	Size int64
}

// DiskStats counts blocks, and bytes of plaintext or of storage.
type DiskStats struct {
	Written   int64 // blocks given to WriteBlock with data
	Zero      int64 // blocks given to WriteBlock as zeros
	Inherited int64 // blocks taken from the parent
	Dedup     int64 // of Written: already stored
	BytesIn   int64 // plaintext bytes of Written
	Stored    int64 // bytes that the repository grew by for them
}

// Query narrows a listing. The zero value matches every point.
type Query struct {
	Chain string
	Run   string
	Name  string
}

// Match reports whether p matches.
func (q Query) Match(p *Point) bool {
	return (q.Chain == "" || q.Chain == p.Chain) && (q.Run == "" || q.Run == p.Run) && (q.Name == "" || q.Name == p.Name)
}

// Extent is a byte range that holds data.
type Extent struct {
	Offset int64
	Length int64
}

// LeafSize is the span of one leaf digest in bytes. Block sizes are multiples.
const LeafSize = 256 << 10

// DefaultBlockSize is the block size that pipelines use, in bytes.
const DefaultBlockSize = 1 << 20

// MaxBlockSize is the largest block size, in bytes.
const MaxBlockSize = 8 << 20

// ValidBlockSize reports whether n is a block size that every engine takes.
func ValidBlockSize(n int) bool {
	return n >= LeafSize && n <= MaxBlockSize && n&(n-1) == 0
}

// Blocks returns how many blocks a disk has; the last may be short.
func Blocks(size int64, blockSize int) int64 {
	bs := int64(blockSize)
	n := size / bs
	if size%bs != 0 {
		n++
	}
	return n
}

// BlockLen returns the length of block index in bytes.
func BlockLen(size int64, blockSize int, index int64) int {
	return int(min(int64(blockSize), size-index*int64(blockSize)))
}

// Digest is a keyed digest of one leaf of plaintext. The zero value stands for a
// leaf of zeros.
type Digest [32]byte

// IsZero reports whether the digest stands for a leaf of zeros.
func (d Digest) IsZero() bool { return d == Digest{} }

// String returns the digest in hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText encodes the digest in hex.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText decodes hex.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) != 2*len(d) {
		return fmt.Errorf("a digest has %d hex digits, not %d", 2*len(d), len(b))
	}
	_, err := hex.Decode(d[:], b)
	return err
}

// DigestKey keys the leaf digests of a chain. It travels with the chain, inside
// what the repository encrypts. It does not print.
type DigestKey [32]byte

// String hides the key.
func (DigestKey) String() string { return "[secret]" }

// GoString hides the key.
func (DigestKey) GoString() string { return "[secret]" }

// Block is one block of a disk.
type Block struct {
	Index int64
	// Data is the plaintext, exactly BlockLen bytes; nil: the block is zeros.
	Data []byte
	// Leaves are the digests of Data, one per LeafSize bytes begun. For a block
	// of zeros they may be nil.
	Leaves []Digest
}

// Proof shows that a point was committed. Only engines make one, at the end of a
// commit whose inventory was checked.
type Proof struct {
	point  Point
	record Digest
	blobs  int
	bytes  int64
}

// ProofFacts are what an engine vouches for.
type ProofFacts struct {
	Point        Point  // as a reader will list it
	Record       Digest // digest of the record as stored
	BlobsChecked int    // stored objects found present with the right size
	BytesChecked int64
}

// NewProof makes the proof of a commit. It refuses facts that prove nothing.
func NewProof(f ProofFacts) (*Proof, error) {
	switch {
	case f.Point.ID == "" || f.Point.Chain == "" || f.Point.Sequence < 1 || f.Point.State != Committed:
		return nil, errors.New("proof of a commit names no committed point")
	case f.Record.IsZero():
		return nil, errors.New("proof of a commit has no record")
	case f.BlobsChecked < 1:
		return nil, errors.New("proof of a commit without an inventory check")
	}
	return &Proof{point: f.Point, record: f.Record, blobs: f.BlobsChecked, bytes: f.BytesChecked}, nil
}

// Point returns a copy of the committed record.
func (p *Proof) Point() Point { return p.point }

// Record returns the digest of the stored record.
func (p *Proof) Record() Digest { return p.record }

// BlobsChecked returns how many stored objects the inventory check saw.
func (p *Proof) BlobsChecked() int { return p.blobs }
