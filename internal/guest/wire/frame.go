package wire

import (
	"encoding/binary"
	"fmt"
	"io"
)

const headerLen = 5

// WriteFrame writes one frame with a single Write. len(payload) must not exceed MaxPayload.
func WriteFrame(w io.Writer, kind Kind, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("frame of %d bytes exceeds the limit of %d", len(payload), MaxPayload)
	}
	frame := make([]byte, headerLen+len(payload))
	frame[0] = byte(kind)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	copy(frame[headerLen:], payload)
	_, err := w.Write(frame)
	return err
}

// ReadFrame reads one frame. The payload lies in buf when it fits there. At a
// clean end between two frames the error is io.EOF, within one
// io.ErrUnexpectedEOF.
func ReadFrame(r io.Reader, buf []byte) (Kind, []byte, error) {
	var header [headerLen]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(header[1:])
	if n > MaxPayload {
		return 0, nil, fmt.Errorf("frame of %d bytes exceeds the limit of %d", n, MaxPayload)
	}
	if int(n) > len(buf) {
		buf = make([]byte, n)
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Kind(header[0]), buf[:n], nil
}
