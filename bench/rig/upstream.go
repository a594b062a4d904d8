package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"sync/atomic"
	"time"
)

const (
	chunks     = 100
	cost       = "0.000015"
	plainBytes = 2000
)

var (
	mark    = []byte("pause=") // a prompt may set the milliseconds between chunks
	streams = regexp.MustCompile(`"stream": ?true`)
	filler  = bytes.Repeat([]byte("The quick brown fox. "), plainBytes/21)
	chunk   = `","object":"chat.completion.chunk","created":1760000000,"model":"google/gemini-2.5-flash-lite","choices":`
	word    = []byte(chunk + `[{"index":0,"delta":{"role":"assistant","content":" fox jumps"},"finish_reason":null,` +
		`"native_finish_reason":null,"logprobs":null}]}` + "\n\n")
	usage = `,"usage":{"prompt_tokens":12,"completion_tokens":100,"total_tokens":112,"cost":` + cost + `,"is_byok":false}}`
)

var served atomic.Uint64

// OpenRouter as a relay sees it: with generation ids, costs and framing as there, but without billing records.
func upstream(arguments []string) error {
	flags := flag.NewFlagSet("upstream", flag.ExitOnError)
	port := flags.Int("port", 0, "port")
	models := flags.String("models", "", "file for GET /models")
	cert := flags.String("cert", "", "certificate")
	key := flags.String("key", "", "private key of the certificate")
	flags.Parse(arguments)
	list := []byte(`{"data":[]}`)
	if *models != "" {
		read, err := os.ReadFile(*models)
		if err != nil {
			return err
		}
		list = read
	}
	epoch := strconv.FormatInt(time.Now().UnixNano(), 36)
	server := &http.Server{
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
			if request.Method == http.MethodGet {
				response.Header().Set("Content-Type", "application/json")
				response.Write(list)
				return
			}
			body, err := io.ReadAll(request.Body)
			if err != nil {
				return
			}
			generationID := "gen-" + epoch + "-" + strconv.FormatUint(served.Add(1), 10)
			response.Header().Set("X-Generation-Id", generationID)
			if streams.Match(body) {
				stream(response, generationID, pause(body))
			} else {
				plain(response, generationID)
			}
		}),
	}
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", *port))
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	if *cert != "" {
		return server.ServeTLS(listener, *cert, *key)
	}
	return server.Serve(listener)
}

func pause(body []byte) time.Duration {
	_, rest, found := bytes.Cut(body, mark)
	if !found {
		return 0
	}
	digits := 0
	for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
		digits++
	}
	milliseconds, _ := strconv.Atoi(string(rest[:digits]))
	return time.Duration(milliseconds) * time.Millisecond
}

func plain(response http.ResponseWriter, generationID string) {
	response.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(response, `{"id":"%s","object":"chat.completion","created":1760000000,"model":"google/gemini-2.5-flash-lite",`+
		`"choices":[{"index":0,"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"}]%s`, generationID, filler, usage)
}

// Each chunk is sent with a write of its own, as OpenRouter does.
func stream(response http.ResponseWriter, generationID string, pause time.Duration) {
	response.Header().Set("Content-Type", "text/event-stream")
	flush := response.(http.Flusher).Flush
	event := append([]byte(`data: {"id":"`+generationID), word...)
	flush()
	for number := 0; number < chunks; number++ {
		if pause > 0 {
			time.Sleep(pause)
		}
		if _, err := response.Write(event); err != nil {
			return
		}
		flush()
	}
	fmt.Fprintf(response, `data: {"id":"%s%s[]%s`+"\n\n", generationID, chunk, usage)
	flush()
	io.WriteString(response, "data: [DONE]\n\n")
}
