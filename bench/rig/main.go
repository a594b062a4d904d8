// The rig of the benchmark: a simulated OpenRouter and a load generator, compiled so that they cost little beside what is measured.
//
//	rig upstream -port N [-models FILE] [-cert FILE -key FILE]
//	rig load -url URL -keys FILE -kind plain|stream|paced|idle -clients N -seconds S
package main

import (
	"fmt"
	"os"
)

func main() {
	run := map[string]func([]string) error{"upstream": upstream, "load": load}
	if len(os.Args) < 2 || run[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: rig upstream|load …")
		os.Exit(2)
	}
	if err := run[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "rig:", err)
		os.Exit(1)
	}
}
