package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"
	"time"
)

var prompts = map[string]string{
	"plain":  `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"Hello"}]}`,
	"stream": `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"Hello"}],"stream":true}`,
	"paced":  `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"pause=5"}],"stream":true}`,
	"idle":   `{"model":"google/gemini-2.5-flash-lite","messages":[{"role":"user","content":"pause=250"}],"stream":true}`,
}

// What one run of callers saw; times in milliseconds.
type figures struct {
	Requests  int     `json:"requests"`
	Errors    int     `json:"errors"`
	Seconds   float64 `json:"seconds"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	FirstP50  float64 `json:"first_byte_p50_ms"`
	FirstP99  float64 `json:"first_byte_p99_ms"`
	FirstFail string  `json:"first_error"`
}

type caller struct {
	whole, first []float64
	errors       int
	fault        string
}

func load(arguments []string) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	url := flags.String("url", "", "address of chat/completions")
	keys := flags.String("keys", "", "file of keys, one a line; callers share them out")
	kind := flags.String("kind", "plain", "plain, stream, paced or idle")
	callers := flags.Int("callers", 1, "callers at once")
	seconds := flags.Float64("seconds", 3, "how long")
	flags.Parse(arguments)
	credentials := []string{"none"}
	if *keys != "" {
		read, err := os.ReadFile(*keys)
		if err != nil {
			return err
		}
		credentials = strings.Fields(string(read))
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConns: *callers, MaxIdleConnsPerHost: *callers, DisableCompression: true}}
	began := time.Now()
	end := began.Add(time.Duration(*seconds * float64(time.Second)))
	seen := make([]caller, *callers)
	var all sync.WaitGroup
	for number := range seen {
		all.Add(1)
		go func(own *caller, key string) {
			defer all.Done()
			buffer := make([]byte, 64*1024)
			for time.Now().Before(end) {
				own.ask(client, *url, key, prompts[*kind], *kind != "plain", buffer)
			}
		}(&seen[number], credentials[number%len(credentials)])
	}
	all.Wait()
	return json.NewEncoder(os.Stdout).Encode(sum(seen, time.Since(began).Seconds()))
}

func (own *caller) ask(client *http.Client, url, key, prompt string, stream bool, buffer []byte) {
	began := time.Now()
	request, _ := http.NewRequest(http.MethodPost, url, strings.NewReader(prompt))
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Authorization", "Bearer "+key)
	answer, err := client.Do(request)
	if err != nil {
		own.fail(err.Error())
		return
	}
	defer answer.Body.Close()
	var first time.Duration
	var tail []byte
	size := 0
	for {
		count, err := answer.Body.Read(buffer)
		if count > 0 {
			if size == 0 {
				first = time.Since(began)
			}
			size += count
			tail = append(tail, buffer[max(0, count-32):count]...)
			tail = tail[max(0, len(tail)-32):]
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			own.fail(err.Error())
			return
		}
	}
	whole := bytes.HasSuffix(tail, []byte("}")) && size > plainBytes/2
	if stream {
		whole = bytes.HasSuffix(tail, []byte("data: [DONE]\n\n")) && size > chunks*100
	}
	if answer.StatusCode != http.StatusOK || !whole {
		own.fail(fmt.Sprintf("status %d, %d bytes, …%s", answer.StatusCode, size, tail))
		return
	}
	own.whole = append(own.whole, milliseconds(time.Since(began)))
	own.first = append(own.first, milliseconds(first))
}

func (own *caller) fail(fault string) {
	own.errors++
	if own.fault == "" {
		own.fault = fault
	}
	time.Sleep(10 * time.Millisecond)
}

func sum(seen []caller, seconds float64) figures {
	total := figures{Seconds: seconds}
	var whole, first []float64
	for _, own := range seen {
		whole = append(whole, own.whole...)
		first = append(first, own.first...)
		total.Errors += own.errors
		if total.FirstFail == "" {
			total.FirstFail = own.fault
		}
	}
	total.Requests = len(whole)
	total.P50, total.P99 = percentiles(whole)
	total.FirstP50, total.FirstP99 = percentiles(first)
	return total
}

func percentiles(values []float64) (p50, p99 float64) {
	if len(values) == 0 {
		return 0, 0
	}
	sort.Float64s(values)
	return values[len(values)/2], values[len(values)*99/100]
}

func milliseconds(duration time.Duration) float64 { return float64(duration.Microseconds()) / 1000 }
