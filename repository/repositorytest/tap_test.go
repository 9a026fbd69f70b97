package repositorytest_test

import (
	"context"
	"io"
	"iter"

	"github.com/holdfast-backup/holdfast/repository"
)

// The taps below pass everything through, but for what a mutant replaces.

type repositoryTap struct {
	repository.Repository
	begin    func(ctx context.Context, spec *repository.PointSpec) (repository.Writer, error)
	points   func(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error]
	open     func(ctx context.Context, id repository.PointID) (repository.Reader, error)
	del      func(ctx context.Context, id repository.PointID, l repository.Lock) error
	verify   func(ctx context.Context, o *repository.VerifyOptions) (*repository.VerifyReport, error)
	maintain func(ctx context.Context, l repository.Lock, o *repository.MaintainOptions) (*repository.MaintainReport, error)
	lock     func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error)
	putNote  func(ctx context.Context, name string, value []byte) error
	notes    func(ctx context.Context, prefix string) iter.Seq2[repository.Note, error]
}

func (r *repositoryTap) Begin(ctx context.Context, spec *repository.PointSpec) (repository.Writer, error) {
	if r.begin != nil {
		return r.begin(ctx, spec)
	}
	return r.Repository.Begin(ctx, spec)
}

func (r *repositoryTap) Points(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
	if r.points != nil {
		return r.points(ctx, q)
	}
	return r.Repository.Points(ctx, q)
}

func (r *repositoryTap) Open(ctx context.Context, id repository.PointID) (repository.Reader, error) {
	if r.open != nil {
		return r.open(ctx, id)
	}
	return r.Repository.Open(ctx, id)
}

func (r *repositoryTap) Delete(ctx context.Context, id repository.PointID, l repository.Lock) error {
	if r.del != nil {
		return r.del(ctx, id, l)
	}
	return r.Repository.Delete(ctx, id, l)
}

func (r *repositoryTap) Verify(ctx context.Context, o *repository.VerifyOptions) (*repository.VerifyReport, error) {
	if r.verify != nil {
		return r.verify(ctx, o)
	}
	return r.Repository.Verify(ctx, o)
}

func (r *repositoryTap) Maintain(ctx context.Context, l repository.Lock, o *repository.MaintainOptions) (*repository.MaintainReport, error) {
	if r.maintain != nil {
		return r.maintain(ctx, l, o)
	}
	return r.Repository.Maintain(ctx, l, o)
}

func (r *repositoryTap) Lock(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
	if r.lock != nil {
		return r.lock(ctx, name, o)
	}
	return r.Repository.Lock(ctx, name, o)
}

func (r *repositoryTap) PutNote(ctx context.Context, name string, value []byte) error {
	if r.putNote != nil {
		return r.putNote(ctx, name, value)
	}
	return r.Repository.PutNote(ctx, name, value)
}

func (r *repositoryTap) Notes(ctx context.Context, prefix string) iter.Seq2[repository.Note, error] {
	if r.notes != nil {
		return r.notes(ctx, prefix)
	}
	return r.Repository.Notes(ctx, prefix)
}

type writerTap struct {
	repository.Writer
	disk   func(ctx context.Context, s repository.DiskSpec) (repository.DiskWriter, error)
	file   func(ctx context.Context, name string, r io.Reader) error
	commit func(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error)
	abort  func(ctx context.Context) error
}

func (w *writerTap) Disk(ctx context.Context, s repository.DiskSpec) (repository.DiskWriter, error) {
	if w.disk != nil {
		return w.disk(ctx, s)
	}
	return w.Writer.Disk(ctx, s)
}

func (w *writerTap) File(ctx context.Context, name string, r io.Reader) error {
	if w.file != nil {
		return w.file(ctx, name, r)
	}
	return w.Writer.File(ctx, name, r)
}

func (w *writerTap) Commit(ctx context.Context, info *repository.CommitInfo) (*repository.Proof, error) {
	if w.commit != nil {
		return w.commit(ctx, info)
	}
	return w.Writer.Commit(ctx, info)
}

func (w *writerTap) Abort(ctx context.Context) error {
	if w.abort != nil {
		return w.abort(ctx)
	}
	return w.Writer.Abort(ctx)
}

type diskTap struct {
	repository.DiskWriter
	write func(ctx context.Context, b repository.Block) error
	close func(ctx context.Context) error
}

func (d *diskTap) WriteBlock(ctx context.Context, b repository.Block) error {
	if d.write != nil {
		return d.write(ctx, b)
	}
	return d.DiskWriter.WriteBlock(ctx, b)
}

func (d *diskTap) Close(ctx context.Context) error {
	if d.close != nil {
		return d.close(ctx)
	}
	return d.DiskWriter.Close(ctx)
}

type diskReaderTap struct {
	repository.DiskReader
	readAt    func(p []byte, off int64) (int, error)
	readBlock func(ctx context.Context, i int64, buf []byte) (repository.Block, error)
	extents   func(ctx context.Context) iter.Seq2[repository.Extent, error]
	leaves    func(ctx context.Context, i int64) ([]repository.Digest, error)
}

func (d *diskReaderTap) ReadAt(p []byte, off int64) (int, error) {
	if d.readAt != nil {
		return d.readAt(p, off)
	}
	return d.DiskReader.ReadAt(p, off)
}

func (d *diskReaderTap) ReadBlock(ctx context.Context, i int64, buf []byte) (repository.Block, error) {
	if d.readBlock != nil {
		return d.readBlock(ctx, i, buf)
	}
	return d.DiskReader.ReadBlock(ctx, i, buf)
}

func (d *diskReaderTap) Extents(ctx context.Context) iter.Seq2[repository.Extent, error] {
	if d.extents != nil {
		return d.extents(ctx)
	}
	return d.DiskReader.Extents(ctx)
}

func (d *diskReaderTap) Leaves(ctx context.Context, i int64) ([]repository.Digest, error) {
	if d.leaves != nil {
		return d.leaves(ctx, i)
	}
	return d.DiskReader.Leaves(ctx, i)
}

type readerTap struct {
	repository.Reader
	disk func(d repository.DiskReader) repository.DiskReader
}

func (r *readerTap) Disk(ctx context.Context, id string) (repository.DiskReader, error) {
	d, err := r.Reader.Disk(ctx, id)
	if err != nil {
		return nil, err
	}
	return r.disk(d), nil
}

// Shorthands for mutants of one part.

func withWriter(r repository.Repository, f func(spec *repository.PointSpec, w repository.Writer) repository.Writer) repository.Repository {
	return &repositoryTap{Repository: r, begin: func(ctx context.Context, spec *repository.PointSpec) (repository.Writer, error) {
		w, err := r.Begin(ctx, spec)
		if err != nil {
			return nil, err
		}
		return f(spec, w), nil
	}}
}

func withDisk(r repository.Repository, f func(s repository.DiskSpec, d repository.DiskWriter) repository.DiskWriter) repository.Repository {
	return withWriter(r, func(_ *repository.PointSpec, w repository.Writer) repository.Writer {
		return &writerTap{Writer: w, disk: func(ctx context.Context, s repository.DiskSpec) (repository.DiskWriter, error) {
			d, err := w.Disk(ctx, s)
			if err != nil {
				return nil, err
			}
			return f(s, d), nil
		}}
	})
}

func withDiskReader(r repository.Repository, f func(d repository.DiskReader) repository.DiskReader) repository.Repository {
	return &repositoryTap{Repository: r, open: func(ctx context.Context, id repository.PointID) (repository.Reader, error) {
		rd, err := r.Open(ctx, id)
		if err != nil {
			return nil, err
		}
		return &readerTap{rd, f}, nil
	}}
}

// withPoint changes every point that is listed.
func withPoint(r repository.Repository, f func(p *repository.Point) bool) repository.Repository {
	return &repositoryTap{Repository: r, points: func(ctx context.Context, q repository.Query) iter.Seq2[*repository.Point, error] {
		return func(yield func(*repository.Point, error) bool) {
			for p, err := range r.Points(ctx, q) {
				if err == nil && !f(p) {
					continue
				}
				if !yield(p, err) {
					return
				}
			}
		}
	}}
}

// lockTap is a lock of which a mutant replaces some methods.
type lockTap struct {
	repository.Lock
	epoch   int64
	check   func(ctx context.Context) error
	renew   func(ctx context.Context) error
	release func(ctx context.Context) error
}

func (l *lockTap) Epoch() int64 {
	if l.epoch != 0 {
		return l.epoch
	}
	return l.Lock.Epoch()
}

func (l *lockTap) Check(ctx context.Context) error {
	if l.check != nil {
		return l.check(ctx)
	}
	return l.Lock.Check(ctx)
}

func (l *lockTap) Renew(ctx context.Context) error {
	if l.renew != nil {
		return l.renew(ctx)
	}
	return l.Lock.Renew(ctx)
}

func (l *lockTap) Release(ctx context.Context) error {
	if l.release != nil {
		return l.release(ctx)
	}
	return l.Lock.Release(ctx)
}

func withLock(r repository.Repository, f func(l repository.Lock) repository.Lock) repository.Repository {
	return &repositoryTap{Repository: r, lock: func(ctx context.Context, name string, o repository.LockOptions) (repository.Lock, error) {
		l, err := r.Lock(ctx, name, o)
		if err != nil {
			return nil, err
		}
		return f(l), nil
	}}
}
