"""The store over Elasticsearch and OpenSearch."""
