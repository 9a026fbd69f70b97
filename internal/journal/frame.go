package journal

import (
	"encoding/binary"
	"hash/crc32"
)

const (
	magic      = "hfjrnl1\n"
	frameHead  = 24
	maxPayload = 256 << 10
)

// Sizes at which a journal stops taking records, so that what must always fit (confirm and
// discharge) always does, and so that whatever was written can be read back.
const (
	maxChatter = 64 << 20  // stages and notes
	maxIntend  = 128 << 20 // obligations
	maxFile    = 256 << 20 // everything, and what decode reads at most
)

// frame is one record as it lies in the file.
type frame struct {
	seq, synced uint64
	payload     []byte // aliases the buffer it was decoded from
}

func frameSum(b []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum(b[:4], table), table, b[8:])
}

// appendFrame appends f to buf. The payload must hold 1 to maxPayload bytes.
func appendFrame(buf []byte, f frame) []byte {
	start := len(buf)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(f.payload)))
	buf = binary.LittleEndian.AppendUint32(buf, 0)
	buf = binary.LittleEndian.AppendUint64(buf, f.seq)
	buf = binary.LittleEndian.AppendUint64(buf, f.synced)
	buf = append(buf, f.payload...)
	binary.LittleEndian.PutUint32(buf[start+4:], frameSum(buf[start:]))
	return buf
}

// parseFrame returns the frame at the start of b and its length in bytes. It accepts sequence
// numbers of at least minSeq only, and looks at the checksum last, since a search calls it for
// every byte.
func parseFrame(b []byte, minSeq uint64) (frame, int, bool) {
	if len(b) < frameHead {
		return frame{}, 0, false
	}
	n := binary.LittleEndian.Uint32(b)
	if n == 0 || n > maxPayload || int(n) > len(b)-frameHead {
		return frame{}, 0, false
	}
	total := frameHead + int(n)
	f := frame{
		seq:     binary.LittleEndian.Uint64(b[8:]),
		synced:  binary.LittleEndian.Uint64(b[16:]),
		payload: b[frameHead:total],
	}
	if f.seq < minSeq || f.synced >= f.seq || f.payload[0] != '{' || f.payload[n-1] != '}' ||
		binary.LittleEndian.Uint32(b[4:]) != frameSum(b[:total]) {
		return frame{}, 0, false
	}
	return f, total, true
}

// contents is what a journal file holds.
type contents struct {
	frames []frame      // in order; with damage, all that could be read
	end    int64        // where the next record goes; meaningless with damage
	torn   int64        // bytes after end
	damage *DamageError // nil unless something durable is lost
}

// decode reads a whole journal file. It never fails: a file that never held a durable record
// has no frames.
func decode(b []byte) contents {
	var c contents
	pos, want := 0, uint64(1)
	if len(b) >= len(magic) && string(b[:len(magic)]) == magic {
		pos = len(magic)
		for {
			f, n, ok := parseFrame(b[pos:], want)
			if !ok || f.seq != want {
				break
			}
			c.frames = append(c.frames, f)
			pos, want = pos+n, want+1
		}
	}
	c.end, c.torn = int64(pos), int64(len(b)-pos)

	// Whatever follows is a torn tail unless a later record proves that the one wanted here was
	// durable. Records of the same unfinished batch may follow it and prove nothing.
	var after []frame
	next, proof := want, false
	for p := pos; p+frameHead < len(b); {
		f, n, ok := parseFrame(b[p:], next)
		if !ok {
			p++
			continue
		}
		after = append(after, f)
		proof = proof || f.synced >= want
		if f.seq == ^uint64(0) {
			break
		}
		p, next = p+n, f.seq+1
	}
	if proof {
		c.frames = append(c.frames, after...)
		c.damage = &DamageError{Offset: int64(pos), Seq: want}
	}
	return c
}
