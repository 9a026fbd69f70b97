package kopiarepo

import (
	"fmt"

	"github.com/kopia/kopia/repo/object"

	"github.com/holdfast-backup/holdfast/internal/digest"
	"github.com/holdfast-backup/holdfast/repository"
)

// The tree of a snapshot:
//
//	config.json
//	disk-<id>/<shard>/<segment>       the bytes, one file per segment
//	digests/disk-<id>/segments        segment digests that are not zero
//	digests/disk-<id>/<shard>/<segment>   leaf digests of one segment
//	file-<name>
//
// Shards and segments are eight digits; a shard holds shardSegments segments and
// is named by its first.

const (
	configFile    = "config.json"
	digestsName   = "digests"
	segmentsName  = "segments"
	shardSegments = 256
)

func diskDir(id string) string     { return "disk-" + id }
func fileEntry(name string) string { return "file-" + name }
func eight(n int64) string         { return fmt.Sprintf("%08d", n) }

// pointConfig is config.json.
type pointConfig struct {
	Format    int                `json:"holdfast"`
	Repo      string             `json:"repository"`
	Point     repository.PointID `json:"point"`
	Chain     string             `json:"chain"`
	Name      string             `json:"name"`
	Run       string             `json:"run"`
	DigestKey hexKey             `json:"digest_key"`
	Disks     []diskConfig       `json:"disks"`
	Files     []fileBody         `json:"files,omitempty"`
}

type diskConfig struct {
	ID           string            `json:"id"`
	Size         int64             `json:"size"`
	BlockSize    int               `json:"block_size"`
	SegmentBytes int64             `json:"segment_bytes"`
	Root         repository.Digest `json:"root"`
	// Zeros are the objects of blocks of zeros, which are never read: that of a
	// whole block, and that of a short last one.
	Zeros []object.ID `json:"zeros,omitempty"`
	// ZeroSegments are the objects of segments of zeros alone.
	ZeroSegments []object.ID `json:"zero_segments,omitempty"`
}

// hexKey is a digest key inside what kopia encrypts.
type hexKey repository.DigestKey

// MarshalText encodes the key in hex.
func (k hexKey) MarshalText() ([]byte, error) { return repository.Digest(k).MarshalText() }

// UnmarshalText decodes hex.
func (k *hexKey) UnmarshalText(b []byte) error { return (*repository.Digest)(k).UnmarshalText(b) }

// geometry is the division of a disk into blocks and segments.
type geometry struct {
	size      int64
	blockSize int
}

func (g geometry) blocks() int64           { return repository.Blocks(g.size, g.blockSize) }
func (g geometry) perSegment() int64       { return digest.SegmentSpan / int64(g.blockSize) }
func (g geometry) blockLen(i int64) int    { return repository.BlockLen(g.size, g.blockSize, i) }
func (g geometry) segments() int64         { return (g.size + digest.SegmentSpan - 1) / digest.SegmentSpan }
func (g geometry) segmentOf(i int64) int64 { return i / g.perSegment() }

// segmentLen returns the length of segment s in bytes.
func (g geometry) segmentLen(s int64) int64 {
	return min(digest.SegmentSpan, g.size-s*digest.SegmentSpan)
}

func (g geometry) segmentBlocks(s int64) int64 {
	return repository.Blocks(g.segmentLen(s), g.blockSize)
}

// leavesOf returns how many leaves n bytes have.
func leavesOf(n int64) int { return int((n + repository.LeafSize - 1) / repository.LeafSize) }

func (g geometry) leavesPerBlock() int { return g.blockSize / repository.LeafSize }

// valid checks what a record or a caller claims.
func (g geometry) valid() error {
	if g.size < 0 || !repository.ValidBlockSize(g.blockSize) || g.size > 1<<60 {
		return fmt.Errorf("a disk of %d bytes in blocks of %d bytes is not possible", g.size, g.blockSize)
	}
	return nil
}
