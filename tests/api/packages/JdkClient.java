// Run by `test_programs.py`: the JDK's own HTTP client as it is by default, which LangChain4j and
// Spring AI use, against a service. It asks for HTTP/2 with every request over plain HTTP.
//
//     java JdkClient.java http://127.0.0.1:8000/v1 KEY picture.png
//
// Prints what each request got, a line for each.

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Stream;

public class JdkClient {
    private static final HttpClient CLIENT = HttpClient.newHttpClient();
    private static final String BOUNDARY = "boundary-of-the-jdk-client";
    private static String key;

    private static <T> HttpResponse<T> post(
            String url, String type, BodyPublisher body, HttpResponse.BodyHandler<T> handler)
            throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url))
            .header("Authorization", "Bearer " + key)
            .header("Content-Type", type)
            .POST(body)
            .build();
        return CLIENT.send(request, handler);
    }

    private static byte[] part(String head, byte[] content) {
        byte[] first = ("--" + BOUNDARY + "\r\nContent-Disposition: form-data; " + head + "\r\n\r\n")
            .getBytes(StandardCharsets.UTF_8);
        byte[] whole = new byte[first.length + content.length + 2];
        System.arraycopy(first, 0, whole, 0, first.length);
        System.arraycopy(content, 0, whole, first.length, content.length);
        whole[whole.length - 2] = '\r';
        whole[whole.length - 1] = '\n';
        return whole;
    }

    private static void print(String what, HttpResponse<String> answer) {
        System.out.println(what + " " + answer.statusCode() + " " + answer.body());
    }

    public static void main(String[] arguments) throws Exception {
        String url = arguments[0];
        key = arguments[1];
        byte[] picture = Files.readAllBytes(Path.of(arguments[2]));
        String generations = url + "/images/generations";
        String json = "application/json";
        BodyPublisher small = BodyPublishers.ofString("{\"prompt\": \"a\", \"size\": \"128x128\"}");
        print("generate", post(generations, json, small, BodyHandlers.ofString()));
        // Of unknown length, so that it is sent in chunks.
        BodyPublisher form = BodyPublishers.ofByteArrays(List.of(
            part("name=\"prompt\"", "a".getBytes(StandardCharsets.UTF_8)),
            part("name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png", picture),
            ("--" + BOUNDARY + "--\r\n").getBytes(StandardCharsets.UTF_8)));
        String multipart = "multipart/form-data; boundary=" + BOUNDARY;
        print("edit", post(url + "/images/edits", multipart, form, BodyHandlers.ofString()));
        BodyPublisher stream = BodyPublishers.ofString("{\"prompt\": \"a\", \"stream\": true}");
        HttpResponse<Stream<String>> events =
            post(generations, json, stream, BodyHandlers.ofLines());
        events.body().filter(line -> line.startsWith("event: ")).forEach(System.out::println);
        BodyPublisher wrong = BodyPublishers.ofString("{\"prompt\": \"a\", \"size\": \"1000x1000\"}");
        print("refused", post(generations, json, wrong, BodyHandlers.ofString()));
    }
}
