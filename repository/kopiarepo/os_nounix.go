//go:build !unix

package kopiarepo

import "os"

// syncDir does nothing: this system makes names durable with the file.
func syncDir(string) error { return nil }

func tryFlock(*os.File) (bool, error) { return true, nil }
