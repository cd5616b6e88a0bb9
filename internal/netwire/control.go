package netwire

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

// replyLimit bounds a reply, in bytes.
const replyLimit = 1 << 20

// Ask sends one request to the banger-net of the VM in dir, however long dir is. While
// banger-net is being started again the error wraps ErrAway.
func Ask(ctx context.Context, dir string, r Request) (Reply, error) {
	reply, err := ask(ctx, dir, r)
	if err != nil {
		return Reply{}, fmt.Errorf("cannot ask the VM's network: %w", err)
	}
	return reply, nil
}

// ErrAway: banger-net does not run, or ended before it answered.
var ErrAway = errors.New("its process is not there")

func ask(ctx context.Context, dir string, r Request) (reply Reply, err error) {
	// A FIFO in its place would be waited for, and no context ends an open.
	at, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return reply, err
	}
	defer at.Close()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(int(at.Fd()))+"/"+ControlSocket)
	if err != nil {
		return reply, errors.Join(ErrAway, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return reply, errors.Join(ErrAway, err)
	}
	line, err := bufio.NewReader(io.LimitReader(conn, replyLimit)).ReadBytes('\n')
	if err != nil {
		if ctx.Err() != nil {
			return reply, context.Cause(ctx)
		}
		return reply, errors.Join(ErrAway, err)
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		return reply, fmt.Errorf("cannot understand the answer: %w", err)
	}
	return reply, nil
}
