package netstack

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/netwire"
	"banger/test/need"
)

// logDir is a VM's directory with an empty log/.
func logDir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(netwire.LogFile)), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// readLog reads the log below dir, the older file first, and fails if a line other than
// a torn one is no Entry.
func readLog(t *testing.T, dir string) (entries []netwire.Entry, torn int) {
	t.Helper()
	for _, name := range []string{netwire.LogOld, netwire.LogFile} {
		f, err := os.Open(filepath.Join(dir, name))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			var e netwire.Entry
			if json.Unmarshal(lines.Bytes(), &e) != nil {
				torn++
				continue
			}
			entries = append(entries, e)
		}
	}
	return entries, torn
}

func counts(entries []netwire.Entry) (sum int64) {
	for _, e := range entries {
		sum += e.Count
	}
	return sum
}

func refusedTo(target string) netwire.Entry {
	return netwire.Entry{Protocol: "tcp", Target: target, Reason: "private network", Rule: target}
}

// TestLogEvents: what is no refusal is written, and counted as none.
func TestLogEvents(t *testing.T) {
	dir := logDir(t, t.TempDir())
	l := newLog(dir)
	g := newGate(l)
	g.relieve()
	g.refuseHint("icmp", netip.MustParseAddrPort("203.0.113.1:0"), "a reason", "a\ncommand")
	l.close()
	if l.refused() != 1 {
		t.Errorf("%d refusals are counted", l.refused())
	}
	entries, _ := readLog(t, dir)
	if len(entries) != 2 || entries[0].Event != "cut" || entries[1].Event != "" || entries[1].Hint != "a command" {
		t.Errorf("written: %+v", entries)
	}
}

func TestLogCountsAlikeEntries(t *testing.T) {
	dir := logDir(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		l := newLog(dir)
		defer l.close()
		start := time.Now()
		for range 10 {
			l.add(refusedTo("192.168.1.1:80"))
		}
		l.add(refusedTo("192.168.1.1:81"))
		synctest.Wait()
		if got, _ := readLog(t, dir); len(got) != 2 || counts(got) != 2 || !got[0].At.Equal(start) {
			t.Fatalf("at once there are %v, not the first of each", got)
		}
		time.Sleep(logWindow - time.Millisecond)
		synctest.Wait()
		if got, _ := readLog(t, dir); len(got) != 2 {
			t.Fatalf("before the window ends there are %v", got)
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		got, _ := readLog(t, dir)
		if len(got) != 3 || got[2].Count != 9 || got[2].Target != "192.168.1.1:80" || got[2].Rule != "192.168.1.1:80" {
			t.Fatalf("after the window there are %v, not one line of 9 more", got)
		}
		// The line began a window; its end without another leaves nothing.
		l.add(refusedTo("192.168.1.1:80"))
		synctest.Wait()
		if got, _ := readLog(t, dir); len(got) != 3 {
			t.Fatalf("in the second window there are %v", got)
		}
		time.Sleep(2 * logWindow)
		l.mu.Lock()
		if l.timer != nil {
			t.Error("a timer runs although nothing waits")
		}
		l.mu.Unlock()
		l.add(refusedTo("192.168.1.1:80"))
		synctest.Wait()
		if got, _ := readLog(t, dir); len(got) != 4+1 || counts(got) != 13 || l.refused() != 13 {
			t.Fatalf("in the end there are %v of %d", got, l.refused())
		}
	})
}

func TestLogCloseWritesWhatWaits(t *testing.T) {
	dir := logDir(t, t.TempDir())
	l := newLog(dir)
	for range 7 {
		l.add(refusedTo("10.0.0.1:22"))
	}
	l.close()
	l.close()
	l.add(refusedTo("10.0.0.1:22"))
	if got, _ := readLog(t, dir); len(got) != 2 || counts(got) != 7 {
		t.Fatalf("after close there are %v", got)
	}
	if l.refused() != 8 {
		t.Errorf("%d refusals counted, not 8", l.refused())
	}
	info, err := os.Stat(filepath.Join(dir, netwire.LogFile))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the file is %v, %v", info.Mode(), err)
	}
}

// TestLogBoundsAFlood: a guest that asks for an address after the other gets no more
// lines than the rate, and no refusal is missing in the counts.
func TestLogBoundsAFlood(t *testing.T) {
	dir := logDir(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		l := newLog(dir)
		const seconds, each = 20, 5000
		for s := range seconds {
			for i := range each {
				l.add(refusedTo(fmt.Sprintf("10.1.%d.%d:%d", i>>8, i&255, 1+s)))
			}
			time.Sleep(time.Second)
		}
		if n := len(l.recent); n > logKeys {
			t.Errorf("%d entries remembered", n)
		}
		l.close()
		got, torn := readLog(t, dir)
		most := logBurst + seconds*logRate + seconds/5 + 1
		if len(got) > most || len(got) < logBurst+(seconds-1)*logRate || torn > 0 {
			t.Errorf("%d lines and %d torn, at most %d", len(got), torn, most)
		}
		if counts(got) != seconds*each {
			t.Errorf("the lines count %d of %d", counts(got), seconds*each)
		}
		last := got[len(got)-1]
		if last.Reason != logSkipped || last.Protocol != "" || last.Count < each-logRate {
			t.Errorf("the last line is %v", last)
		}
	})
}

// TestLogForgetsOldKeys: windows that are over make room, however slow the guest is.
func TestLogForgetsOldKeys(t *testing.T) {
	dir := logDir(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		l := newLog(dir)
		for i := range 3 * logKeys {
			l.add(refusedTo(fmt.Sprintf("10.0.0.1:%d", 1+i)))
			time.Sleep(time.Second / logRate)
		}
		if n := len(l.recent); n > logKeys {
			t.Errorf("%d entries remembered", n)
		}
		l.close()
		if got, _ := readLog(t, dir); len(got) != 3*logKeys {
			t.Errorf("%d lines, not %d", len(got), 3*logKeys)
		}
	})
}

func TestLogRotates(t *testing.T) {
	dir := logDir(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		l := newLog(dir)
		long := strings.Repeat("x", logField-10)
		for i := range 5000 {
			l.add(netwire.Entry{Protocol: "dns", Target: fmt.Sprint(i), Name: long, Reason: long})
			time.Sleep(time.Second / logRate)
		}
		l.close()
	})
	for _, name := range []string{netwire.LogFile, netwire.LogOld} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Size() > logFileSize || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	got, torn := readLog(t, dir)
	if torn > 0 || len(got) < 900 || got[len(got)-1].Target != "4999" {
		t.Errorf("%d lines, %d torn, the last is %v", len(got), torn, got[len(got)-1])
	}
	for i, e := range got[1:] {
		if fmt.Sprint(e.Target) != fmt.Sprint(atoi(t, got[i].Target)+1) {
			t.Fatalf("%s follows %s", e.Target, got[i].Target)
		}
	}
}

func atoi(t *testing.T, s string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLogCleansTexts(t *testing.T) {
	dir := logDir(t, t.TempDir())
	l := newLog(dir)
	bad := "a\x1b[31m\nb\u202e\x00\xff" + strings.Repeat("é", 4*logField)
	l.add(netwire.Entry{Protocol: bad, Target: bad, Name: bad, Reason: bad, Rule: bad})
	l.close()
	got, _ := readLog(t, dir)
	if len(got) != 1 {
		t.Fatalf("there are %v", got)
	}
	for _, s := range []string{got[0].Protocol, got[0].Target, got[0].Name, got[0].Reason, got[0].Rule} {
		if !strings.HasPrefix(s, "a[31m b?é") || len(s) > logField || len(s) < logField-2 || strings.ContainsAny(s, "\x1b\n\u202e\x00") {
			t.Errorf("%d bytes: %q", len(s), s)
		}
	}
}

// TestLogFollowsNoLink: the name of the log may lead nowhere else.
func TestLogFollowsNoLink(t *testing.T) {
	dir := logDir(t, t.TempDir())
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("untouched\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, filepath.Join(dir, netwire.LogFile)); err != nil {
		t.Fatal(err)
	}
	l := newLog(dir)
	l.add(refusedTo("10.0.0.1:22"))
	l.close()
	if data, err := os.ReadFile(other); string(data) != "untouched\n" {
		t.Errorf("the other file holds %q, %v", data, err)
	}
}

// TestLogSurvivesAFullDisk on a file system of 16 KiB, half of which another file has.
func TestLogSurvivesAFullDisk(t *testing.T) {
	need.Need(t, "root")
	dir := logDir(t, smallDisk(t, "16k"))
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, make([]byte, 8<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLog(dir)
	const full = 90
	for i := range full {
		l.add(refusedTo(fmt.Sprintf("10.0.0.1:%d", 1+i)))
	}
	l.close()
	before, torn := readLog(t, dir)
	if len(before) < 5 || len(before) >= full || torn != 1 {
		t.Fatalf("a full disk has %d lines and %d torn: the test needs some and one", len(before), torn)
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	l = newLog(dir)
	for i := range 10 {
		l.add(refusedTo(fmt.Sprintf("10.0.0.2:%d", 1+i)))
	}
	l.close()
	if after, torn := readLog(t, dir); len(after) != len(before)+10 || torn != 1 {
		t.Errorf("%d lines and %d torn after %d", len(after), torn, len(before))
	}
}

// smallDisk makes a file system that is mounted nowhere, so that a test that is killed
// leaves nothing.
func smallDisk(t *testing.T, size string) (dir string) {
	t.Helper()
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "size", size); err != nil {
		t.Fatal(err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatal(err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(mount) })
	return fmt.Sprintf("/proc/self/fd/%d", mount)
}
