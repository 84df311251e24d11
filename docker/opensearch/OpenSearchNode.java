import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import org.opensearch.analysis.common.CommonAnalysisPlugin;
import org.opensearch.cluster.service.ClusterService;
import org.opensearch.common.settings.Settings;
import org.opensearch.env.Environment;
import org.opensearch.index.mapper.MapperExtrasPlugin;
import org.opensearch.index.reindex.ReindexPlugin;
import org.opensearch.node.InternalSettingsPreparer;
import org.opensearch.node.Node;
import org.opensearch.transport.Netty4Plugin;

/**
 * An OpenSearch node without security, for tests.
 *
 * <pre>java -cp 'lib/*:classes' OpenSearchNode HOME OWNER [setting=value ...]</pre>
 *
 * HOME keeps the data: a second start there recovers them. The node ends with the process whose id is OWNER, so that
 * it outlives no test run, however that one ends; 0 is no owner.
 */
final class OpenSearchNode extends Node {

    private OpenSearchNode(Environment environment) {
        super(
                environment,
                List.of(Netty4Plugin.class, MapperExtrasPlugin.class, ReindexPlugin.class, CommonAnalysisPlugin.class),
                true);
    }

    @Override
    protected void configureNodeAndClusterIdStateListener(ClusterService clusterService) {
        // It tells a part of OpenSearch's own log configuration, which is not in use here.
    }

    public static void main(String[] arguments) throws Exception {
        Path home = Path.of(arguments[0]).toAbsolutePath();
        long owner = Long.parseLong(arguments[1]);
        for (String folder : List.of("config", "data", "logs", "modules", "plugins")) {
            Files.createDirectories(home.resolve(folder));
        }
        Settings.Builder settings = Settings.builder()
                .put("path.home", home.toString())
                .put("cluster.name", "vdr-db-tests")
                .put("node.name", "node")
                .put("discovery.type", "single-node")
                // Tests make and drop many indices, on a disk that may be nearly full.
                .put("cluster.max_shards_per_node", "20000")
                .put("cluster.routing.allocation.disk.threshold_enabled", "false");
        for (int i = 2; i < arguments.length; i++) {
            String[] parts = arguments[i].split("=", 2);
            settings.put(parts[0], parts[1]);
        }
        Environment environment = InternalSettingsPreparer.prepareEnvironment(
                settings.build(), Map.of(), home.resolve("config"), () -> "node");
        Node node = new OpenSearchNode(environment);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> close(node)));
        node.start();
        System.out.println("ready");
        while (owner == 0 || isAlive(owner)) {
            Thread.sleep(500);
        }
        System.exit(0);
    }

    private static boolean isAlive(long process) {
        Optional<ProcessHandle> found = ProcessHandle.of(process);
        return found.isPresent() && found.get().isAlive();
    }

    private static void close(Node node) {
        try {
            node.close();
            node.awaitClose(20, TimeUnit.SECONDS);
        } catch (Exception error) {
            error.printStackTrace();
        }
    }
}
