package extent

import "iter"

// Blocks yields, ascending and each once, the indexes of the blocks of blockSize bytes that s
// touches on a disk of diskSize bytes. The last block of the disk may be short. blockSize must be
// positive and diskSize not negative, else the only pair is an ErrBlockSize; a range that is not
// well formed or reaches outside the disk ends the stream with an *Error.
func Blocks(s Seq, blockSize, diskSize int64) iter.Seq2[int64, error] {
	return func(yield func(int64, error) bool) {
		if blockSize <= 0 || diskSize < 0 {
			yield(0, ErrBlockSize)
			return
		}
		next := int64(0) // first index not yielded yet
		for r, err := range Check(s, diskSize) {
			if err != nil {
				yield(0, err)
				return
			}
			last := (r.End() - 1) / blockSize
			for i := max(next, r.Off/blockSize); i <= last; i++ {
				if !yield(i, nil) {
					return
				}
			}
			next = max(next, last+1)
		}
	}
}

// Align yields the canonical ranges that cover whole blocks of blockSize bytes wherever s touches
// one; the last one is cut at diskSize. Its errors are those of Blocks. Where Blocks yields each
// index, Align yields each run, so it stays cheap for long extents.
func Align(s Seq, blockSize, diskSize int64) Seq {
	return func(yield func(Range, error) bool) {
		if blockSize <= 0 || diskSize < 0 {
			yield(Range{}, ErrBlockSize)
			return
		}
		j := joiner{yield: yield}
		for r, err := range Check(s, diskSize) {
			if err != nil {
				yield(Range{}, err)
				return
			}
			off := r.Off - r.Off%blockSize
			end := diskSize
			if tail := (blockSize - r.End()%blockSize) % blockSize; tail < diskSize-r.End() {
				end = r.End() + tail
			}
			if !j.add(Range{off, end - off}) {
				return
			}
		}
		j.flush()
	}
}
