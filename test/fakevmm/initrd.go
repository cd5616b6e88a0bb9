package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"

	"banger/internal/guest/wire"
)

// readConfig finds the guest's configuration in an initramfs: uncompressed cpio
// archives in the newc format, one after the other.
func readConfig(initrd string) (wire.Config, error) {
	var config wire.Config
	f, err := os.Open(initrd)
	if err != nil {
		return config, err
	}
	defer f.Close()
	r := bufio.NewReader(f)
	for {
		name, size, err := readHeader(r)
		if err == io.EOF {
			return config, errors.New("the initramfs has none")
		}
		if err != nil {
			return config, err
		}
		if path.Clean("/"+name) == wire.ConfigPath {
			data := make([]byte, size)
			if _, err := io.ReadFull(r, data); err != nil {
				return config, err
			}
			return config, json.Unmarshal(data, &config)
		}
		if _, err := io.CopyN(io.Discard, r, (size+3)&^3); err != nil {
			return config, err
		}
	}
}

const headerLen = 110

func readHeader(r *bufio.Reader) (name string, size int64, err error) {
	// Archives may be padded with zeros, in words of four.
	for {
		b, err := r.Peek(1)
		if err != nil {
			return "", 0, err
		}
		if b[0] != 0 {
			break
		}
		r.Discard(1)
	}
	header := make([]byte, headerLen)
	if _, err := io.ReadFull(r, header); err != nil {
		return "", 0, err
	}
	if string(header[:6]) != "070701" {
		return "", 0, fmt.Errorf("not a newc header: %q", header[:6])
	}
	size, err = strconv.ParseInt(string(header[54:62]), 16, 64)
	if err != nil {
		return "", 0, err
	}
	nameLen, err := strconv.ParseInt(string(header[94:102]), 16, 64)
	if err != nil || nameLen < 1 || nameLen > 4096 {
		return "", 0, fmt.Errorf("name of %d bytes: %w", nameLen, err)
	}
	// Header and name together are padded to four bytes.
	padded := make([]byte, (headerLen+nameLen+3)&^3-headerLen)
	if _, err := io.ReadFull(r, padded); err != nil {
		return "", 0, err
	}
	return string(padded[:nameLen-1]), size, nil
}
