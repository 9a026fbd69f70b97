package vmdk

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
)

// packer compresses one grain at a time.
type packer struct {
	in    []byte
	at    int64
	out   bytes.Buffer
	z     *zlib.Writer
	ready chan error
}

// pack compresses one grain behind its marker, padded to whole sectors.
func (p *packer) pack() {
	var head [12]byte
	p.out.Reset()
	p.out.Write(head[:])
	p.z.Reset(&p.out)
	_, err := p.z.Write(p.in)
	if err == nil {
		err = p.z.Close()
	}
	b := p.out.Bytes()
	binary.LittleEndian.PutUint64(b, uint64(p.at*(writeGrain/sector)))
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-len(head)))
	p.out.Write(make([]byte, roundUp(int64(len(b)), sector)-int64(len(b))))
	p.ready <- err
}
