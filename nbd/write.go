package nbd

import (
	"context"
	"errors"
	"fmt"
)

// WriteAt writes p at byte offset off, without a limit in time. It implements io.WriterAt. Offset and
// length must be multiples of BlockSizes().Minimum and within the export. p is not retained.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.WriteAtContext(context.Background(), p, off, 0)
}

// WriteAtContext is WriteAt ending when ctx does, with flags (CommandFUA alone is permitted). When ctx
// ends while data is being sent the connection is lost. Data is safe on the server's storage after Flush
// or with CommandFUA. On an error the first n bytes were accepted; the fate of the others is unknown.
func (c *Client) WriteAtContext(ctx context.Context, p []byte, off int64, flags CommandFlags) (int, error) {
	if err := c.checkChange("write", off, int64(len(p)), flags, CommandFUA, 0); err != nil || len(p) == 0 {
		return 0, err
	}
	ops := c.split(cmdWrite, uint16(flags), off, p, true)
	err := c.do(ctx, ops, true, c.acquire, 0)
	return progress(ops, off, len(p)), err
}

// WriteZeroes makes n bytes at off read as zeroes. flags may hold CommandFUA, CommandNoHole and
// CommandFastZero; with the latter an error matching ENOTSUP means that writing zeroes is no faster here
// (with more than 1 GiB, a part may have been zeroed before). A server without the command gives an
// error matching errors.ErrUnsupported.
func (c *Client) WriteZeroes(ctx context.Context, off, n int64, flags CommandFlags) error {
	const allowed = CommandFUA | CommandNoHole | CommandFastZero
	if err := c.checkChange("write-zeroes", off, n, flags, allowed, FlagSendWriteZeroes); err != nil || n == 0 {
		return err
	}
	return c.do(ctx, effects(cmdWriteZeroes, uint16(flags), off, n), true, c.acquire, 0)
}

// Trim tells the server that n bytes at off are no longer needed; what they read as afterwards is not
// defined. flags may hold CommandFUA. A server without the command gives an error matching
// errors.ErrUnsupported.
func (c *Client) Trim(ctx context.Context, off, n int64, flags CommandFlags) error {
	if err := c.checkChange("trim", off, n, flags, CommandFUA, FlagSendTrim); err != nil || n == 0 {
		return err
	}
	return c.do(ctx, effects(cmdTrim, uint16(flags), off, n), true, c.acquire, 0)
}

// Flush returns when every change that was acknowledged before the call is on stable storage. A server
// without the command gives an error matching errors.ErrUnsupported. Once a connection was lost after a
// change, Flush fails for good: the changes may be gone.
func (c *Client) Flush(ctx context.Context) error {
	if !c.sess.info.Flags.Has(FlagSendFlush) {
		return fmt.Errorf("nbd: flush: %w", errors.ErrUnsupported)
	}
	return c.do(ctx, []op{{cmd: cmdFlush}}, true, c.acquire, 0)
}

// effects cuts an operation without payload into requests well below 2^32 bytes.
func effects(cmd, flags uint16, off, n int64) []op {
	var ops []op
	for n > 0 {
		step := min(n, maxEffect)
		ops = append(ops, op{cmd: cmd, flags: flags, off: off, length: uint32(step)})
		off, n = off+step, n-step
	}
	return ops
}

// checkChange checks a change of the export before anything is sent.
func (c *Client) checkChange(name string, off, n int64, flags, allowed CommandFlags, need Flags) error {
	info := &c.sess.info
	block := info.BlockSizes.Minimum
	switch {
	case off < 0 || n < 0 || off > info.Size || n > info.Size-off:
		return fmt.Errorf("%w: %s of %d bytes at %d of %d", ErrOutOfRange, name, n, off, info.Size)
	case info.Flags.Has(FlagReadOnly):
		return fmt.Errorf("%w: %s", ErrReadOnly, name)
	case !info.Flags.Has(need):
		return fmt.Errorf("nbd: %s: %w", name, errors.ErrUnsupported)
	case flags&^allowed != 0:
		return fmt.Errorf("nbd: %s: flags %#x: %w", name, uint16(flags), EINVAL)
	case flags&CommandFUA != 0 && !info.Flags.Has(FlagSendFUA):
		return fmt.Errorf("nbd: %s: FUA: %w", name, errors.ErrUnsupported)
	case flags&CommandFastZero != 0 && !info.Flags.Has(FlagSendFastZero):
		return fmt.Errorf("nbd: %s: fast zero: %w", name, errors.ErrUnsupported)
	case off%block != 0 || n%block != 0:
		return fmt.Errorf("%w: %s of %d bytes at %d, block %d", ErrUnaligned, name, n, off, block)
	}
	return nil
}
