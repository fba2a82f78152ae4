// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of /proc/PID/stat: USER_HZ, 100 on every Linux that Go
// runs on.
const clockTick = 10 * time.Millisecond

// cpuTime is the time that a process has used, in its own code and in the kernel.
func cpuTime(pid int) (time.Duration, error) {
	if pid == 0 {
		return 0, nil
	}
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	user, err := strconv.Atoi(fields[11]) // utime, field 14
	if err != nil {
		return 0, err
	}
	system, err := strconv.Atoi(fields[12]) // stime
	return time.Duration(user+system) * clockTick, err
}

// stat returns the fields of /proc/PID/stat after the command's name.
func stat(pid int) ([]string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	_, after, _ := strings.Cut(string(raw), ") ")
	return strings.Fields(after), nil
}

// memory reads one line of /proc/PID/status, in bytes: VmRSS is the resident memory, VmHWM
// the most of it that the process has had.
func memory(pid int, line string) (int64, error) {
	if pid == 0 {
		return 0, nil
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, ok := strings.Cut(string(raw), line)
	if !ok {
		return 0, fmt.Errorf("no %s for process %d", line, pid)
	}
	kib, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
	return kib << 10, err
}

// childOf finds the child of parent that runs the named program.
func childOf(parent int, program string) (int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		fields, err := stat(pid)
		if err != nil || fields[1] != strconv.Itoa(parent) {
			continue
		}
		if exe, err := os.Readlink(d + "/exe"); err == nil && filepath.Base(exe) == program {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("process %d has no child %s", parent, program)
}
