package nbd

import (
	"context"
	"encoding/binary"
	"errors"
)

// maxListed bounds the number of exports taken from a server's list.
const maxListed = 10000

// List asks the server for its exports. Only Name and Description of the results are filled in; servers
// may leave exports out. The export named in cfg is ignored.
func List(ctx context.Context, cfg Config) ([]ExportInfo, error) {
	var list []ExportInfo
	err := ask(ctx, cfg, func(n *negotiator) error {
		if err := n.option(optList, nil); err != nil {
			return err
		}
		for {
			typ, data, err := n.reply(optList)
			if err != nil {
				return err
			}
			if typ == repAck {
				return nil
			}
			if typ != repServer || len(data) < 4 {
				return handshakef("reply %#x of %d bytes to LIST", typ, len(data))
			}
			size := binary.BigEndian.Uint32(data)
			if data = data[4:]; int64(size) > int64(len(data)) || size > maxString {
				return handshakef("export name of %d bytes in a reply of %d", size, len(data))
			}
			if len(list) == maxListed {
				return handshakef("more than %d exports", maxListed)
			}
			text := data[size:]
			list = append(list, ExportInfo{
				Name:        string(data[:size]),
				Description: string(text[:min(len(text), maxString)]),
			})
		}
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// Describe asks the server about the export named in cfg without opening it. Contexts lists the
// metadata contexts that can be asked for; it is empty when the server has no structured replies. A
// server too old to answer gives an error matching errors.ErrUnsupported.
func Describe(ctx context.Context, cfg Config) (ExportInfo, error) {
	var info ExportInfo
	err := ask(ctx, cfg, func(n *negotiator) error {
		if err := n.structuredReplies(); err != nil {
			return err
		}
		n.sess.info = ExportInfo{Name: cfg.Export, BlockSizes: defaultBlockSizes()}
		if n.sess.structured {
			err := n.metaContexts(optListMetaContext, nil)
			var opt *OptionError
			if err != nil && (!errors.As(err, &opt) || opt.Code != repErrUnsup) {
				return err
			}
		}
		if err := n.infoOrGo(optInfo, []uint16{infoBlockSize, infoDescription}); err != nil {
			return err
		}
		info = n.sess.info
		return nil
	})
	return info, err
}

// ask runs one exchange of options and hangs up.
func ask(ctx context.Context, cfg Config, f func(*negotiator) error) error {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	n, err := open(ctx, &cfg)
	if err != nil {
		return err
	}
	if !n.fixed {
		_ = n.nc.Close()
		return handshakef("the server knows no options (not fixed newstyle)")
	}
	return guarded(ctx, n.nc, func() error {
		defer n.abort()
		return f(n)
	})
}
