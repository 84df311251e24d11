import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import org.apache.lucene.document.Document;
import org.apache.lucene.document.FeatureField;
import org.apache.lucene.index.DirectoryReader;
import org.apache.lucene.index.IndexWriter;
import org.apache.lucene.index.IndexWriterConfig;
import org.apache.lucene.index.NoMergePolicy;
import org.apache.lucene.search.BooleanClause;
import org.apache.lucene.search.BooleanQuery;
import org.apache.lucene.search.BoostQuery;
import org.apache.lucene.search.IndexSearcher;
import org.apache.lucene.search.Query;
import org.apache.lucene.search.ScoreDoc;
import org.apache.lucene.store.ByteBuffersDirectory;
import org.apache.lucene.store.Directory;

/**
 * Scores sparse rows with Lucene itself, in the way a search server does for `rank_feature` clauses
 * with `linear`: a should clause for each feature, its weight as a boost around the linear query.
 *
 * Usage: FeatureScores INPUT OUTPUT. Both are little-endian. INPUT: int documents, int queries, and
 * for each row int n, int[n] ids, float[n] weights. OUTPUT: for each query int hits, then for each
 * hit in the engine's order int document, float score. Every matching document is a hit.
 */
public final class FeatureScores {
  private static final String FIELD = "vdr";

  public static void main(String[] arguments) throws IOException {
    ByteBuffer input = ByteBuffer.wrap(Files.readAllBytes(Path.of(arguments[0])));
    input.order(ByteOrder.LITTLE_ENDIAN);
    int documents = input.getInt();
    int queries = input.getInt();
    ByteBuffer output = ByteBuffer.allocate(4 * queries * (1 + 2 * documents));
    output.order(ByteOrder.LITTLE_ENDIAN);
    try (Directory directory = new ByteBuffersDirectory()) {
      // Without merges the number of a document is the order in which it came.
      IndexWriterConfig config = new IndexWriterConfig().setMergePolicy(NoMergePolicy.INSTANCE);
      try (IndexWriter writer = new IndexWriter(directory, config)) {
        for (int i = 0; i < documents; i++) {
          Document document = new Document();
          Row row = Row.read(input);
          for (int j = 0; j < row.ids.length; j++) {
            document.add(new FeatureField(FIELD, String.valueOf(row.ids[j]), row.weights[j]));
          }
          writer.addDocument(document);
        }
      }
      try (DirectoryReader reader = DirectoryReader.open(directory)) {
        IndexSearcher searcher = new IndexSearcher(reader);
        for (int i = 0; i < queries; i++) {
          ScoreDoc[] hits = searcher.search(Row.read(input).query(), documents).scoreDocs;
          output.putInt(hits.length);
          for (ScoreDoc hit : hits) {
            output.putInt(hit.doc);
            output.putFloat(hit.score);
          }
        }
      }
    }
    output.flip();
    byte[] bytes = new byte[output.remaining()];
    output.get(bytes);
    Files.write(Path.of(arguments[1]), bytes);
  }

  private static final class Row {
    final int[] ids;
    final float[] weights;

    private Row(int[] ids, float[] weights) {
      this.ids = ids;
      this.weights = weights;
    }

    static Row read(ByteBuffer input) {
      int n = input.getInt();
      int[] ids = new int[n];
      float[] weights = new float[n];
      for (int j = 0; j < n; j++) {
        ids[j] = input.getInt();
      }
      for (int j = 0; j < n; j++) {
        weights[j] = input.getFloat();
      }
      return new Row(ids, weights);
    }

    Query query() {
      BooleanQuery.Builder builder = new BooleanQuery.Builder();
      for (int j = 0; j < ids.length; j++) {
        Query linear = FeatureField.newLinearQuery(FIELD, String.valueOf(ids[j]), 1f);
        builder.add(new BoostQuery(linear, weights[j]), BooleanClause.Occur.SHOULD);
      }
      return builder.build();
    }
  }
}
